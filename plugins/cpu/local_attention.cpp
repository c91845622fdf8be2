// The torch side of local_attention.h: checks, strides, threads, and the op difa::local_attention_cpu.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
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
    case 64: return run_tiles<T, Units, 64>(problem);
    default: TORCH_CHECK(false, "a tile has 16, 32 or 64 queries, or 0 to choose; not ", tile);
  }
}

#if defined(__AVX512BF16__)
using BFloat16Units = difa::BFloat16Pairs;
#else
using BFloat16Units = difa::FloatUnits;
#endif

void place(difa::Problem& p, at::IntArrayRef grid, int64_t before, int64_t after, int64_t pooled, int64_t queries,
           bool disc, int64_t radius) {
  TORCH_CHECK(!grid.empty() && grid.size() <= 3, "the grid must have one to three sizes");
  std::fill(std::begin(p.grid), std::end(p.grid), 1);
  std::copy(grid.begin(), grid.end(), std::end(p.grid) - grid.size());
  p.before = before, p.after = after, p.pooled = pooled, p.queries = queries;
  p.first = queries == p.tokens() ? 0 : before;
  TORCH_CHECK(p.first == 0 || queries == p.image() || queries == p.image() + after,
              "the queries are neither all tokens, nor the image's, nor these and those after them");
  p.form = disc ? difa::Form::kDisc : difa::Form::kBox;
  p.radius = radius;
}

// What a call with these sizes does per head: queries per tile, tiles, and the keys of all tiles added up.
std::vector<int64_t> local_attention_cpu_work(at::IntArrayRef grid, int64_t before, int64_t after, int64_t pooled,
                                              int64_t queries, bool disc, int64_t radius, at::ScalarType dtype) {
  difa::Problem p{};
  place(p, grid, before, after, pooled, queries, disc, radius);
  if (dtype == at::kBFloat16) return work<difa::BFloat16, BFloat16Units>(p);
  return work<float, difa::FloatUnits>(p);
}

Tensor local_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef grid,
                           int64_t before, int64_t after, int64_t pooled, bool disc, int64_t radius, double scale,
                           const optional<Tensor>& mask, int64_t tile) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value must be (B, H, L, D)");
  difa::Problem p{};
  place(p, grid, before, after, pooled, query.size(2), disc, radius);
  p.batch = query.size(0), p.heads = query.size(1), p.key_heads = key.size(1);
  p.head_dim = static_cast<int>(query.size(3)), p.value_dim = static_cast<int>(value.size(3));
  TORCH_CHECK(key.size(0) == p.batch && value.size(0) == p.batch && value.size(1) == p.key_heads &&
                  key.size(3) == p.head_dim && key.size(2) == value.size(2),
              "key and value do not fit the query");
  TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0, "the key heads must divide the query heads");
  TORCH_CHECK(key.size(2) == p.tokens() + pooled, "the keys do not fit the grid");
  p.scale = static_cast<float>(scale);
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.query_strides = strides_of(query), p.key_strides = strides_of(key), p.value_strides = strides_of(value);
  Tensor held;
  if (mask.has_value()) {
    held = mask->expand({p.batch, p.heads, p.queries, key.size(2)});
    p.mask = held.const_data_ptr();
    p.mask_strides = strides_of(held);
    switch (held.scalar_type()) {
      case at::kBool: p.mask_type = difa::MaskType::kBool; break;
      case at::kFloat: p.mask_type = difa::MaskType::kFloat; break;
      case at::kBFloat16: p.mask_type = difa::MaskType::kBFloat16; break;
      case at::kHalf: p.mask_type = difa::MaskType::kHalf; break;
      default: TORCH_CHECK(false, "the mask must be bool, float32, bfloat16 or float16");
    }
  }
  const Tensor out = at::empty({p.batch, p.queries, p.heads, p.value_dim}, query.options()).transpose(1, 2);
  p.out = out.data_ptr();
  p.out_strides = strides_of(out);
  switch (query.scalar_type()) {
    case at::kFloat: run<float, difa::FloatUnits>(p, tile); break;
    case at::kBFloat16: run<difa::BFloat16, BFloat16Units>(p, tile); break;
    case at::kHalf: run<difa::Half, difa::FloatUnits>(p, tile); break;
    default: TORCH_CHECK(false, "local attention takes float32, bfloat16 or float16");
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
