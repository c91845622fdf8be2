// The torch side of local_attention.h: checks, strides, threads, and the op difa::local_attention_cpu.

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "local_attention.h"

namespace {

using at::Tensor;
using std::optional;

difa::Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

template <class T, class Units, int Tile>
void run_tiles(const difa::Problem& problem) {
  const difa::Attention<T, Units, Tile> attention(problem);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), attention.tasks()));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attention.work(next);
  });
}

template <class T, class Units, int Tile>
std::vector<int64_t> work_in_tiles(const difa::Problem& problem) {
  const auto [tiles, keys] = difa::Attention<T, Units, Tile>(problem).work_per_head();
  return {Tile, tiles, keys};
}

template <class T, class Units>
std::vector<int64_t> work(const difa::Problem& problem) {
  switch (difa::best_tile<Units>(problem)) {
    case 16: return work_in_tiles<T, Units, 16>(problem);
    case 32: return work_in_tiles<T, Units, 32>(problem);
    default: return work_in_tiles<T, Units, 64>(problem);
  }
}

template <class T, class Units>
void run(const difa::Problem& problem, int64_t tile) {
  switch (tile ? tile : difa::best_tile<Units>(problem)) {
    case 16: return run_tiles<T, Units, 16>(problem);
    case 32: return run_tiles<T, Units, 32>(problem);
    default: return run_tiles<T, Units, 64>(problem);
  }
}

#if defined(__AVX512BF16__)
using BFloat16Units = difa::BFloat16Pairs;
#else
using BFloat16Units = difa::FloatUnits;
#endif

// Whether all that a tensor's sizes and strides reach lies in its memory, which may have been resized below it.
bool in_memory(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return static_cast<uint64_t>(last) < t.storage().nbytes() / t.element_size();
}

void check_memory(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested(), "the ", name,
              " must be a dense tensor on the CPU; it is ", t.layout(), " on ", t.device());
  TORCH_CHECK(in_memory(t), "the ", name, "'s memory is smaller than its sizes and strides say");
  TORCH_CHECK(!(at::GradMode::is_enabled() && t.requires_grad()), "the ", name, " requires a gradient, which ",
              "difa::local_attention_cpu has not; call difa::local_attention, or this under no_grad");
}

void check_operand(const Tensor& t, const char* name, at::ScalarType dtype) {
  check_memory(t, name);
  TORCH_CHECK(t.dim() == 4, "the ", name, " must be (batch, heads, tokens, channels); it has ", t.dim(), " dimensions");
  TORCH_CHECK(t.scalar_type() == dtype, "the ", name, " is ", t.scalar_type(), " and the query ", dtype,
              "; cast them to one dtype");
}

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "local attention on the CPU takes float32, bfloat16 or float16, not ", dtype);
}

int channels(int64_t count) { return static_cast<int>(std::min<int64_t>(count, difa::kMostChannels + 1)); }

// What a call with these sizes does per head: queries per tile, tiles, and the keys of all tiles added up.
std::vector<int64_t> local_attention_cpu_work(at::IntArrayRef grid, int64_t before, int64_t after, int64_t pooled,
                                              int64_t queries, bool disc, int64_t radius, at::ScalarType dtype) {
  check_dtype(dtype);
  difa::Problem p{};
  difa::place(p, grid.data(), grid.size(), before, after, pooled, queries, disc ? difa::Form::kDisc : difa::Form::kBox,
              radius);
  if (dtype == at::kBFloat16) return work<difa::BFloat16, BFloat16Units>(p);
  return work<float, difa::FloatUnits>(p);
}

Tensor local_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef grid,
                           int64_t before, int64_t after, int64_t pooled, bool disc, int64_t radius, double scale,
                           const optional<Tensor>& mask, int64_t tile) {
  check_dtype(query.scalar_type());
  check_operand(query, "query", query.scalar_type());
  check_operand(key, "key", query.scalar_type());
  check_operand(value, "value", query.scalar_type());
  TORCH_CHECK(tile == 0 || tile == 16 || tile == 32 || tile == 64,
              "a tile has 16, 32 or 64 queries, or 0 to choose; not ", tile);
  difa::Problem p{};
  difa::place(p, grid.data(), grid.size(), before, after, pooled, query.size(2),
              disc ? difa::Form::kDisc : difa::Form::kBox, radius);
  p.batch = query.size(0), p.heads = query.size(1), p.key_heads = key.size(1);
  p.head_dim = channels(query.size(3)), p.value_dim = channels(value.size(3));
  TORCH_CHECK(key.size(0) == p.batch && value.size(0) == p.batch && value.size(1) == p.key_heads &&
                  key.size(3) == query.size(3) && key.size(2) == value.size(2),
              "key ", key.sizes(), " and value ", value.sizes(), " do not fit the query ", query.sizes());
  TORCH_CHECK(key.size(2) == p.tokens() + pooled, "the grid, before, after and pooled make ", p.tokens() + pooled,
              " keys; there are ", key.size(2));
  p.scale = static_cast<float>(std::clamp<double>(scale, -std::numeric_limits<float>::max(),
                                                  std::numeric_limits<float>::max()));  // NaN stays
  Tensor held;
  if (mask.has_value()) {
    check_memory(*mask, "mask");
    const std::array<int64_t, 4> whole{p.batch, p.heads, p.queries, key.size(2)};
    TORCH_CHECK(at::is_expandable_to(mask->sizes(), whole), "the mask ", mask->sizes(), " does not broadcast to ",
                at::IntArrayRef(whole), ", which is (batch, heads, queries, keys)");
    held = mask->expand(whole);
    p.mask = held.const_data_ptr();
    p.mask_strides = strides_of(held);
    switch (held.scalar_type()) {
      case at::kBool: p.mask_type = difa::MaskType::kBool; break;
      case at::kFloat: p.mask_type = difa::MaskType::kFloat; break;
      case at::kBFloat16: p.mask_type = difa::MaskType::kBFloat16; break;
      case at::kHalf: p.mask_type = difa::MaskType::kHalf; break;
      default: TORCH_CHECK(false, "the mask must be bool, float32, bfloat16 or float16, not ", held.scalar_type());
    }
  }
  const Tensor out = at::empty({p.batch, p.queries, p.heads, value.size(3)}, query.options()).transpose(1, 2);
  if (out.numel() == 0) return out;
  difa::check(p);
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.query_strides = strides_of(query), p.key_strides = strides_of(key), p.value_strides = strides_of(value);
  p.out = out.data_ptr();
  p.out_strides = strides_of(out);
  switch (query.scalar_type()) {
    case at::kFloat: run<float, difa::FloatUnits>(p, tile); break;
    case at::kBFloat16: run<difa::BFloat16, BFloat16Units>(p, tile); break;
    default: run<difa::Half, difa::FloatUnits>(p, tile);
  }
  return out;
}

TORCH_LIBRARY_FRAGMENT(difa, m) {
  m.def("local_attention_cpu(Tensor query, Tensor key, Tensor value, int[] grid, int before, int after, int pooled, "
        "bool disc, int radius, float scale, Tensor? mask, int tile) -> Tensor");
  m.def("local_attention_cpu_work(int[] grid, int before, int after, int pooled, int queries, bool disc, int radius, "
        "ScalarType dtype) -> int[]", &local_attention_cpu_work);
}
TORCH_LIBRARY_IMPL(difa, CPU, m) { m.impl("local_attention_cpu", &local_attention_cpu); }

}  // namespace
