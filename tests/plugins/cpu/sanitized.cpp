// Random and hostile calls of local_attention.h, to be compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
//
// Operands lie in heap blocks that end where their sizes and strides do, so that a read or write beyond is found. Gaps
// between rows hold NaN, so that one that is used spoils the output. Outputs are compared with a plain loop in double.
// Arguments: a seed, the number of random calls, that of hostile ones. Prints "ok" at the end.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "local_attention.h"

using difa::BFloat16, difa::FloatUnits, difa::Form, difa::Half, difa::MaskType, difa::Problem, difa::Strides;
#if defined(__AVX512BF16__)
using BFloat16Units = difa::BFloat16Pairs;
#else
using BFloat16Units = FloatUnits;
#endif

namespace {

std::mt19937_64 generator;

int64_t below(int64_t count) { return std::uniform_int_distribution<int64_t>(0, count - 1)(generator); }
int64_t one_of(std::initializer_list<int64_t> from) { return from.begin()[below(from.size())]; }
float normal() { return std::normal_distribution<float>()(generator); }

void fail(const char* what, const Problem& p) {
  std::fprintf(stderr, "%s: grid %ld %ld %ld before %ld after %ld pooled %ld queries %ld radius %ld form %d\n", what,
               long(p.grid[0]), long(p.grid[1]), long(p.grid[2]), long(p.before), long(p.after), long(p.pooled),
               long(p.queries), long(p.radius), int(p.form));
  std::abort();
}

// A tensor of four dimensions in a heap block of its own, its dimensions in any order in memory, rows apart or together,
// some broadcast. What its strides do not reach is NaN.
template <class T>
struct Block {
  int64_t sizes[4], steps[4], count = 1;
  std::unique_ptr<T[]> data;

  Block(std::initializer_list<int64_t> of, bool broadcast) {
    std::copy(of.begin(), of.end(), sizes);
    int order[4] = {3, 2, 1, 0};
    if (below(2)) std::shuffle(order, order + 4, generator);
    const int64_t gap = one_of({1, 1, 2});
    int64_t step = order[0] == 3 ? 1 : gap, last = 0;
    for (const int axis : order) {
      steps[axis] = broadcast && below(3) == 0 ? 0 : step;
      last += (sizes[axis] - 1) * steps[axis];
      step *= sizes[axis];
      if (axis == order[0]) step += gap - 1;
    }
    count = last + 1;
    data.reset(new T[count]);
    for (int64_t i = 0; i < count; ++i) difa::from_float(std::nanf(""), data[i]);
  }
  Strides strides() const { return {steps[0], steps[1], steps[2], steps[3]}; }
  T& operator()(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return data[b * steps[0] + h * steps[1] + t * steps[2] + d * steps[3]];
  }
  template <class Made>
  Block& fill(Made made) {
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t t = 0; t < sizes[2]; ++t)
          for (int64_t d = 0; d < sizes[3]; ++d) made((*this)(b, h, t, d));
    return *this;
  }
};

// The definition, from the numbers that a caller gave.
struct Asked {
  int64_t grid[3], dims, before, after, pooled, radius;
  Form form;

  bool sees(int64_t query, int64_t key) const {
    int64_t image = 1;
    for (int64_t i = 0; i < dims; ++i) image *= grid[i];
    int64_t one = query - before, two = key - before;
    const bool image_query = one >= 0 && one < image;
    if (key >= before + image + after) return image_query;
    if (!image_query || two < 0 || two >= image) return true;
    double squared = 0, farthest = 0;
    for (int64_t i = dims - 1; i >= 0; --i) {
      const double apart = std::abs(static_cast<double>(one % grid[i] - two % grid[i]));
      one /= grid[i], two /= grid[i];
      squared += apart * apart, farthest = std::max(farthest, apart);
    }
    const double reach = static_cast<double>(radius);
    return form == Form::kBox ? farthest <= reach : squared < reach * reach;
  }
};

template <class T, class Units, int Tile>
void work(const Problem& p) {
  const difa::Attention<T, Units, Tile> attention(p);
  std::atomic<int64_t> next{0};
  attention.work(next);
}

template <class T, class Units>
void random_call(float unit) {
  Asked a{};
  a.dims = 1 + below(3);
  for (int64_t i = 0; i < a.dims; ++i) a.grid[i] = 1 + below(a.dims == 1 ? 150 : a.dims == 2 ? 14 : 6);
  a.before = one_of({0, 0, 1, 7, 70}), a.after = one_of({0, 0, 3, 40}), a.pooled = one_of({0, 0, 5});
  a.form = below(2) ? Form::kDisc : Form::kBox;
  a.radius = below(6) ? 1 + below(9) : one_of({300, 4096, 4097, int64_t{1} << 40, INT64_MAX});
  int64_t image = 1;
  for (int64_t i = 0; i < a.dims; ++i) image *= a.grid[i];
  const int64_t tokens = a.before + image + a.after, keys = tokens + a.pooled;
  const int64_t queries = one_of({tokens, image, image + a.after});
  Problem p{};
  difa::place(p, a.grid, a.dims, a.before, a.after, a.pooled, queries, a.form, a.radius);
  p.batch = 1 + below(2), p.key_heads = 1 + below(2), p.heads = p.key_heads * (1 + below(2));
  p.head_dim = static_cast<int>(one_of({1, 2, 7, 16, 33, 64}));
  p.value_dim = static_cast<int>(one_of({1, 2, 7, 16, 33, 64}));
  p.scale = below(3) ? 0.3f : static_cast<float>(one_of({-1, 0, 1}));
  difa::check(p);
  const auto made = [](T& number) { difa::from_float(normal(), number); };
  const Block<T> query = std::move(Block<T>({p.batch, p.heads, queries, p.head_dim}, true).fill(made));
  const Block<T> key = std::move(Block<T>({p.batch, p.key_heads, keys, p.head_dim}, true).fill(made));
  const Block<T> value = std::move(Block<T>({p.batch, p.key_heads, keys, p.value_dim}, true).fill(made));
  const Block<float> added = std::move(Block<float>({p.batch, p.heads, queries, keys}, true).fill([](float& number) {
    number = below(4) ? normal() : -difa::kInfinity;
  }));
  std::unique_ptr<bool[]> hides(new bool[added.count]);
  for (int64_t i = 0; i < added.count; ++i) hides[i] = added.data[i] > -difa::kInfinity;
  p.mask_type = std::array{MaskType::kNone, MaskType::kNone, MaskType::kFloat, MaskType::kBool}[below(4)];
  if (p.mask_type != MaskType::kNone) p.mask_strides = added.strides();
  if (p.mask_type == MaskType::kFloat) p.mask = added.data.get();
  if (p.mask_type == MaskType::kBool) p.mask = hides.get();
  std::unique_ptr<T[]> out(new T[p.batch * queries * p.heads * p.value_dim]);
  p.out = out.get(), p.out_strides = {queries * p.heads * p.value_dim, p.value_dim, p.heads * p.value_dim, 1};
  p.query = query.data.get(), p.query_strides = query.strides();
  p.key = key.data.get(), p.key_strides = key.strides();
  p.value = value.data.get(), p.value_strides = value.strides();
  switch (one_of({16, 32, 64})) {
    case 16: work<T, Units, 16>(p); break;
    case 32: work<T, Units, 32>(p); break;
    default: work<T, Units, 64>(p);
  }
  // Some queries against the definition.
  const int64_t first = queries == tokens ? 0 : a.before;
  for (int64_t trial = 0; trial < 6; ++trial) {
    const int64_t b = below(p.batch), h = below(p.heads), q = below(queries), k = h / (p.heads / p.key_heads);
    std::vector<double> weights(keys, 0.0);
    double top = -HUGE_VAL, sum = 0, largest = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = 0; j < keys; ++j) {
        const float bias = p.mask_type == MaskType::kNone ? 0 : added(b, h, q, j);
        if (!a.sees(q + first, j) || bias == -difa::kInfinity) continue;
        double score = 0;
        for (int64_t d = 0; d < p.head_dim; ++d)
          score += double(difa::to_float(query(b, h, q, d))) * double(difa::to_float(key(b, k, j, d)));
        score = score * p.scale + (p.mask_type == MaskType::kFloat ? bias : 0);
        if (pass == 0) top = std::max(top, score);
        else sum += weights[j] = std::exp(score - top);
      }
    for (int64_t d = 0; d < p.value_dim; ++d) {
      double wanted = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const double number = difa::to_float(value(b, k, j, d));
        wanted += sum > 0 ? weights[j] / sum * number : 0;
        largest = std::max(largest, std::abs(number));
      }
      const double found = difa::to_float(out[((b * queries + q) * p.heads + h) * p.value_dim + d]);
      const double bound = largest * (2 * unit + 32 * std::sqrt(double(p.head_dim)) * 1.2e-7);
      if (!(std::abs(found - wanted) <= bound)) {
        std::fprintf(stderr, "found %g, wanted %g, within %g\n", found, wanted, bound);
        fail("wrong", p);
      }
    }
  }
}

// Numbers from the edges of what an int64 holds: refused, or what is kept is in bounds and can be worked with.
bool hostile_call() {
  const auto edge = [] {
    return one_of({INT64_MIN, -1, 0, 1, 2, 7, 64, 4096, 1 << 24, (1 << 24) + 1, int64_t{1} << 30, (int64_t{1} << 30) + 1,
                   int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62, INT64_MAX});
  };
  // As a caller goes wrong: one or two numbers, the others in order.
  const int64_t wrong = below(256) & below(256);
  int64_t numbers[8] = {3, 4, 2, 5, 0, 0, 29, 2};  // sizes, before, after, pooled, queries, radius
  const int64_t dims = below(20) ? 1 + below(3) : one_of({0, 4, 5});
  numbers[6] = numbers[3] + 3 * (dims > 1 ? 4 : 1) * (dims > 2 ? 2 : 1);
  for (int i = 0; i < 8; ++i)
    if (wrong >> i & 1) numbers[i] = edge();
  const int64_t grid[5] = {numbers[0], numbers[1], numbers[2], 1, 1};
  Problem p{};
  try {
    difa::place(p, grid, dims, numbers[3], numbers[4], numbers[5], numbers[6], below(2) ? Form::kDisc : Form::kBox,
                numbers[7]);
  } catch (const std::invalid_argument&) {
    return false;
  }
  const bool kept = p.image() >= 1 && p.image() <= difa::kMostPlaces && p.radius >= 0 && p.radius <= p.image() + 1 &&
                    p.first >= 0 && p.first + p.queries <= p.tokens() && p.queries >= p.image();
  if (!kept) fail("out of bounds", p);
  const auto [tiles, keys] = difa::Attention<float, FloatUnits, 32>(p).work_per_head();
  if (tiles < 1 || keys < p.image() || difa::best_tile<FloatUnits>(p) < 16) fail("no work", p);
  p.batch = one_of({INT64_MIN, -1, 0, 1, 2, int64_t{1} << 40}), p.heads = one_of({-4, 0, 1, 4, int64_t{1} << 40});
  p.key_heads = one_of({-1, 0, 1, 2, 3, INT64_MAX});
  p.head_dim = static_cast<int>(one_of({INT32_MIN, -1, 0, 1, 64, 1024, 1025, INT32_MAX})), p.value_dim = 8;
  p.scale = std::array{std::nanf(""), difa::kInfinity, -3e38f, 1.0f, 1.0f, 0.0f}[below(6)];
  try {
    difa::check(p);
  } catch (const std::invalid_argument&) {
    return false;
  }
  const bool fits = p.batch > 0 && p.heads > 0 && p.heads % p.key_heads == 0 && p.head_dim >= 1 && p.head_dim <= 1024;
  if (!fits || !std::isfinite(p.scale)) fail("unchecked", p);
  return true;
}

}  // namespace

int main(int, char** arguments) {
  generator.seed(std::atoll(arguments[1]));
  for (int64_t i = std::atoll(arguments[2]); i > 0; --i) switch (i % 3) {
      case 0: random_call<float, FloatUnits>(1.2e-7f); break;
      case 1: random_call<BFloat16, BFloat16Units>(7.9e-3f); break;
      default: random_call<Half, FloatUnits>(9.8e-4f);
    }
  int64_t taken = 0;
  const int64_t hostile = std::atoll(arguments[3]);
  for (int64_t i = 0; i < hostile; ++i) taken += hostile_call();
  if (hostile && (taken == 0 || taken > hostile / 2)) std::abort();
  std::puts("ok");
}
