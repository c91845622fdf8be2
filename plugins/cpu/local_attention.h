// Local attention on the CPU: softmax attention in which image tokens see image tokens of their neighbourhood only and
// all other tokens see and are seen by everything. The specification is difa_compile/reference.py.
//
// The unit of work is a tile: kTile queries of one head that are neighbours on the grid. The keys that any of them may
// see are runs of tokens, one run per row of the grid, found from the geometry; what no query of the tile sees is never
// touched. Runs are worked off in chunks of kChunk keys:
//
//   scores (keys x queries) = K Qt      keys from memory as broadcasts, queries as vectors: neither is repacked
//   mask, running maximum, exponential  vertical: a vector holds one key and kLanes queries
//   Ot (channels x queries) += Vt P     the same product, with channels in place of keys
//
// Pairs inside the tile's keys that are out of a query's own neighbourhood are masked by geometry: no table, no tensor.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd.h"

namespace difa {

enum class Form { kDisc, kBox };  // a band is a box on a grid of one dimension

enum class MaskType { kNone, kBool, kFloat, kBFloat16, kHalf };

struct Strides {
  int64_t batch, head, token, channel;
};

// Sizes in tokens and elements, strides in elements.
struct Problem {
  int64_t batch, heads, key_heads, queries;
  int64_t grid[3];                // time, height, width: 1 where the grid has fewer dimensions
  int64_t before, after, pooled;  // other tokens around the image; further keys that image queries see
  int64_t first;                  // the token that the first query is: 0, or `before`
  int head_dim, value_dim;
  Form form;
  int64_t radius;
  float scale;
  const void *query, *key, *value;
  void* out;
  Strides query_strides, key_strides, value_strides, out_strides;
  MaskType mask_type;
  const void* mask;
  Strides mask_strides;  // batch, head, query (as token), key (as channel); 0 where it is broadcast

  int64_t image() const { return grid[0] * grid[1] * grid[2]; }
  int64_t tokens() const { return before + image() + after; }
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

// Bounds. A problem is checked once, by `place` and `check`, which throw std::invalid_argument; all that follows relies
// on them.

constexpr int64_t kMostPlaces = int64_t{1} << 24;  // places on the grid are counted in float32, exact up to here
constexpr int64_t kMostDisc = 4096;                // and so are squared distances
constexpr int64_t kMostOthers = int64_t{1} << 30;  // other tokens on one side, pooled keys: products fit 64 bits
constexpr int kMostChannels = 1024;
constexpr float kMostScale = 1e38f;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("local attention on the CPU: ") + what);
}

// Sets the geometry: the grid's `dims` sizes, tokens and keys around it, the queries' number, the window.
//
// The window may be of any radius. What is kept is the same window in its plainest form: one that covers the grid is a
// box on a grid of one dimension, a disc on one dimension is a box, axes of one token stand first, and no radius is
// larger than the grid.
inline void place(Problem& p, const int64_t* grid, int64_t dims, int64_t before, int64_t after, int64_t pooled,
                  int64_t queries, Form form, int64_t radius) {
  require(dims >= 1 && dims <= 3, "the grid must have one to three sizes");
  int64_t image = 1, largest = 1, diagonal = 0;
  for (int64_t i = 0; i < dims; ++i) {
    require(grid[i] >= 1, "the grid's sizes must be at least 1");
    require(grid[i] <= kMostPlaces / image, "the grid must have at most 2^24 tokens");
    image *= grid[i];
    largest = std::max(largest, grid[i]);
    diagonal += (grid[i] - 1) * (grid[i] - 1);  // of sizes whose product is below 2^25
  }
  require(before >= 0 && after >= 0 && pooled >= 0, "before, after and pooled must not be negative");
  require(std::max({before, after, pooled}) <= kMostOthers, "before, after and pooled must be at most 2^30");
  require(radius >= 1, "the radius must be at least 1");
  radius = std::min(radius, 2 * kMostPlaces);  // reaches over any diagonal
  std::fill(std::begin(p.grid), std::end(p.grid), 1);
  if (form == Form::kBox ? radius >= largest - 1 : radius * radius > diagonal) {
    p.grid[2] = image;
    p.form = Form::kBox, p.radius = image;
  } else {
    int axis = 2;
    for (int64_t i = dims - 1; i >= 0; --i)
      if (grid[i] > 1) p.grid[axis--] = grid[i];
    const bool line = axis == 1;
    p.form = line ? Form::kBox : form;
    p.radius = line && form == Form::kDisc ? radius - 1 : radius;
    require(p.form == Form::kBox || radius <= kMostDisc, "a disc's radius must be at most 4096 unless it covers the grid");
  }
  p.before = before, p.after = after, p.pooled = pooled, p.queries = queries;
  require(queries == p.tokens() || queries == image || queries == image + after,
          "the queries are neither all tokens, nor the image's, nor these and those after them");
  p.first = queries == p.tokens() ? 0 : before;
}

// Checks the sizes of a problem that `place` was called for. Batch and heads are those of memory that exists.
inline void check(const Problem& p) {
  require(p.batch >= 1 && p.heads >= 1 && p.key_heads >= 1, "batch and heads must be at least 1");
  require(p.heads % p.key_heads == 0, "the key heads must divide the query heads");
  require(std::min(p.head_dim, p.value_dim) >= 1 && std::max(p.head_dim, p.value_dim) <= kMostChannels,
          "the head dimension and the values' must be 1 to 1024");
  int64_t rows;
  require(!__builtin_mul_overflow(p.batch, p.heads, &rows) && !__builtin_mul_overflow(rows, p.queries, &rows),
          "the output does not fit 64 bits");
  require(std::fabs(p.scale) <= kMostScale, "the scale must be a number of at most 1e38");
}

// Products. Both multiply a broadcast number with a vector of queries; they differ in what a unit of 32 bits holds.

struct FloatUnits {
  static constexpr int kPerUnit = 1;
  static Floats multiply_add(Floats sum, const float* unit, Floats x) { return sum + *unit * x; }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs {  // two neighbours of the summed dimension per unit
  static constexpr int kPerUnit = 2;
  static Floats multiply_add(Floats sum, const float* unit, Floats x) {
    int32_t pair;
    std::memcpy(&pair, unit, 4);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512)x);
  }
};
#endif

// A product keeps kRows broadcast numbers times kColumns vectors of queries in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
template <int Tile>
constexpr int kColumns = Tile / kLanes < 2 ? 1 : 2;

// out[i * Tile + q] = sum over u of rows[i][u] * x[u * Tile + q], for N rows and kColumns vectors of q.
template <class Units, int Tile, int N>
inline void dot_rows(const float* const* rows, const float* x, int units, float* out) {
  const float* row[N];
  for (int i = 0; i < N; ++i) row[i] = rows[i];
  Floats sum[N][kColumns<Tile>];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < kColumns<Tile>; ++c) sum[i][c] = Floats{};
  for (int u = 0; u < units; ++u) {
    Floats column[kColumns<Tile>];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns<Tile>; ++c) column[c] = load(x + u * Tile + c * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns<Tile>; ++c) sum[i][c] = Units::multiply_add(sum[i][c], row[i] + u, column[c]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < kColumns<Tile>; ++c) store(out + i * Tile + c * kLanes, sum[i][c]);
}

// out[i * Tile + q] += sum over k of rows[k][i] * x[k * Tile + q], for N columns i of the rows.
template <class Units, int Tile, int N>
inline void add_columns(const float* const* rows, int first, const float* x, int count, float* out) {
  Floats sum[N][kColumns<Tile>];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < kColumns<Tile>; ++c) sum[i][c] = load(out + i * Tile + c * kLanes);
  for (int k = 0; k < count; ++k) {
    const float* row = rows[k] + first;
    Floats column[kColumns<Tile>];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns<Tile>; ++c) column[c] = load(x + k * Tile + c * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns<Tile>; ++c) sum[i][c] = Units::multiply_add(sum[i][c], row + i, column[c]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < kColumns<Tile>; ++c) store(out + i * Tile + c * kLanes, sum[i][c]);
}

template <class Units, int Tile>
inline void score_product(const float* const* rows, int count, const float* x, int units, float* out) {
  for (int c = 0; c < Tile; c += kColumns<Tile> * kLanes) {
    int i = 0;
    for (; i + kRows <= count; i += kRows) dot_rows<Units, Tile, kRows>(rows + i, x + c, units, out + i * Tile + c);
    if (i + 4 <= count && kRows > 4) dot_rows<Units, Tile, 4>(rows + i, x + c, units, out + i * Tile + c), i += 4;
    for (; i < count; ++i) dot_rows<Units, Tile, 1>(rows + i, x + c, units, out + i * Tile + c);
  }
}

template <class Units, int Tile>
inline void value_product(const float* const* rows, int count, const float* x, int channels, float* out) {
  for (int c = 0; c < Tile; c += kColumns<Tile> * kLanes) {
    int i = 0;
    for (; i + kRows <= channels; i += kRows)
      add_columns<Units, Tile, kRows>(rows, i, x + c, count, out + i * Tile + c);
    for (; i < channels; ++i) add_columns<Units, Tile, 1>(rows, i, x + c, count, out + i * Tile + c);
  }
}

// Floats that begin on a cache line, so that no vector lies across two.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(float), kLine))) {}
  ~Buffer() { ::operator delete[](data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

// Geometry.

// Keys first .. first + count - 1, all in one row of the grid (reach >= 0: index among the tile's rows) or seen by all.
struct Run {
  int64_t first, count;
  int row;
  int64_t x;  // place of the first key in its row
};

// The patch of the grid that a tile covers.
struct TileShape {
  int size[3];  // time, height, width
};

template <int Tile>
struct Place {
  int64_t query[Tile];  // index among the queries; -1: beyond the grid's edge
};

// What a patch sees of the grid: its rows one after the other as (time, height, first x, last x).
class Patch {
 public:
  Patch(const Problem& p, const int64_t low[3], const TileShape& shape) : p_(p) {
    for (int i = 0; i < 3; ++i) low_[i] = low[i], high_[i] = std::min(low[i] + shape.size[i], p.grid[i]) - 1;
  }

  template <class Visit>
  void rows(Visit visit) const {
    const bool disc = p_.form == Form::kDisc;
    const int64_t budget = p_.radius * p_.radius - 1, far = disc ? p_.radius - 1 : p_.radius;
    for (int64_t t = std::max<int64_t>(0, low_[0] - far); t <= std::min(p_.grid[0] - 1, high_[0] + far); ++t)
      for (int64_t y = std::max<int64_t>(0, low_[1] - far); y <= std::min(p_.grid[1] - 1, high_[1] + far); ++y) {
        int64_t wide = p_.radius;
        if (disc) {
          const int64_t dt = apart(0, t), dy = apart(1, y), rest = budget - dt * dt - dy * dy;
          if (rest < 0) continue;
          wide = static_cast<int64_t>(std::sqrt(static_cast<double>(rest)));
        }
        visit(t, y, std::max<int64_t>(0, low_[2] - wide), std::min(p_.grid[2] - 1, high_[2] + wide));
      }
  }

  int64_t keys() const {
    int64_t keys = p_.form == Form::kBox ? 1 : 0;
    if (p_.form == Form::kBox)
      for (int i = 0; i < 3; ++i)
        keys *= std::min(p_.grid[i] - 1, high_[i] + p_.radius) - std::max<int64_t>(0, low_[i] - p_.radius) + 1;
    else
      rows([&](int64_t, int64_t, int64_t first, int64_t last) { keys += last - first + 1; });
    return keys;
  }

 private:
  int64_t apart(int axis, int64_t place) const {
    return std::max<int64_t>({0, low_[axis] - place, place - high_[axis]});
  }

  const Problem& p_;
  int64_t low_[3], high_[3];
};

// The runs of keys that a tile of the image sees, and for each row how far each query sees in it.
template <int Tile>
class Neighbourhood {
 public:
  std::vector<Run> runs;
  std::vector<float> reach;  // per row and query: largest squared (disc) or plain (box) distance along x; -1: none
  alignas(64) float x[Tile];

  Neighbourhood(const Problem& p, const TileShape& shape) : p_(p), shape_(shape) {
    for (int q = 0; q < Tile; ++q) {
      lane_[0][q] = static_cast<float>(q / (shape.size[1] * shape.size[2]));
      lane_[1][q] = static_cast<float>(q / shape.size[2] % shape.size[1]);
      lane_[2][q] = static_cast<float>(q % shape.size[2]);
    }
  }

  // For the tile whose first token is at `low`; fills `place` too.
  void move_to(const int64_t low[3], Place<Tile>& place) {
    runs.clear();
    reach.clear();
    if (p_.before) runs.push_back({0, p_.before, -1, 0});
    const float radius = static_cast<float>(p_.radius), budget = radius * radius - 1;
    Patch(p_, low, shape_).rows([&](int64_t t, int64_t y, int64_t first, int64_t last) {
      const int row = static_cast<int>(reach.size() / Tile);
      runs.push_back({p_.before + (t * p_.grid[1] + y) * p_.grid[2] + first, last - first + 1, row, first});
      reach.resize(reach.size() + Tile);
      float* of_row = &reach[static_cast<size_t>(row) * Tile];
      const float dt = static_cast<float>(t - low[0]), dy = static_cast<float>(y - low[1]);
      for (int q = 0; q < Tile; ++q) {
        const float a = std::fabs(dt - lane_[0][q]), b = std::fabs(dy - lane_[1][q]);
        const float rest = p_.form == Form::kDisc ? budget - a * a - b * b : a <= radius && b <= radius ? radius : -1;
        of_row[q] = rest < 0 ? -1 : rest;
      }
    });
    if (p_.after + p_.pooled) runs.push_back({p_.before + p_.image(), p_.after + p_.pooled, -1, 0});
    const int64_t first = (low[0] * p_.grid[1] + low[1]) * p_.grid[2] + low[2] + p_.before - p_.first;
    for (int q = 0; q < Tile; ++q) {
      const int64_t t = static_cast<int64_t>(lane_[0][q]), y = static_cast<int64_t>(lane_[1][q]);
      const int64_t along = static_cast<int64_t>(lane_[2][q]);
      const bool inside = low[0] + t < p_.grid[0] && low[1] + y < p_.grid[1] && low[2] + along < p_.grid[2];
      place.query[q] = inside ? first + (t * p_.grid[1] + y) * p_.grid[2] + along : -1;
      x[q] = static_cast<float>(low[2]) + lane_[2][q];
    }
  }

 private:
  const Problem& p_;
  const TileShape shape_;
  alignas(64) float lane_[3][Tile];  // where each query of the tile stands in it
};

// The patch of `tile` queries with the fewest pairs over the whole grid, edges counted, and that number.
inline std::pair<TileShape, double> best_shape(const Problem& p, int tile) {
  std::pair<TileShape, double> best{{{1, 1, tile}}, -1};
  for (int t = 1; t <= tile; t *= 2)
    for (int y = 1; t * y <= tile; y *= 2) {
      const TileShape shape{{t, y, tile / (t * y)}};
      if ((t > 1 && t >= 2 * p.grid[0]) || (y > 1 && y >= 2 * p.grid[1])) continue;
      double tiles = tile;
      int64_t low[3];
      for (int i = 0; i < 3; ++i) {
        const int64_t count = (p.grid[i] + shape.size[i] - 1) / shape.size[i];
        tiles *= static_cast<double>(count);
        low[i] = count / 2 * shape.size[i];  // a tile in the middle stands for all
      }
      const double pairs = tiles * static_cast<double>(Patch(p, low, shape).keys() + p.before + p.after + p.pooled);
      if (best.second < 0 || pairs < best.second) best = {shape, pairs};
    }
  return best;
}

// Queries per tile. A tile of 64 makes more pairs that nobody needs, at a lower price each: as seen on a Zen 5, 0.85
// of a tile of 32's in float32, 0.75 in bfloat16, where values are repacked once per tile.
template <class Units>
inline int best_tile(const Problem& p) {
  if (p.image() <= 16 && kLanes <= 16) return 16;
  const double price = Units::kPerUnit == 2 ? 0.75 : 0.85;
  return price * best_shape(p, 64).second < best_shape(p, 32).second ? 64 : 32;
}

// One tile.

constexpr int kChunk = 128;

template <class T, class Units, int Tile>
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : p_(problem),
        sign_(sign_of(problem)),
        scale_(sign_ == 0 ? 1.0f : std::fabs(problem.scale)),
        query_units_((p_.head_dim + Units::kPerUnit - 1) / Units::kPerUnit),
        query_(query_units_ * Tile),
        staged_(Tile * std::max(p_.head_dim, p_.value_dim) + kLanes * Tile),
        scores_(kChunk * Tile),
        out_(p_.value_dim * Tile),
        keys_(direct_keys() ? 0 : kChunk * (p_.head_dim + 1)),
        values_(direct_values() ? 0 : kChunk * p_.value_dim) {}

  // `neighbourhood` is null for a tile of other tokens, which see all keys but the pooled ones.
  void run(int64_t batch, int64_t head, const Place<Tile>& place, const std::vector<Run>& runs,
           const Neighbourhood<Tile>* neighbourhood) {
    const int64_t key_head = head / (p_.heads / p_.key_heads);
    const T* query = at<T>(p_.query, p_.query_strides, batch, head);
    const T* key = at<T>(p_.key, p_.key_strides, batch, key_head);
    const T* value = at<T>(p_.value, p_.value_strides, batch, key_head);
    load_queries(query, place);
    std::fill_n(out_.data(), p_.value_dim * Tile, 0.0f);
    for (int c = 0; c < Tile / kLanes; ++c) maximum_[c] = all(-kInfinity), sum_[c] = Floats{};
    int64_t total = 0;
    for (const Run& run : runs) total += run.count;
    smaller_ = static_cast<float>(std::bit_width(static_cast<uint64_t>(total)) + 1);
    const int64_t chunks = (total + kChunk - 1) / kChunk;
    size_t at_run = 0;
    int64_t used = 0, done = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int count = static_cast<int>(total * (chunk + 1) / chunks - done);
      done += count;
      int filled = 0;
      while (filled < count) {
        const Run& run = runs[at_run];
        const int take = static_cast<int>(std::min<int64_t>(count - filled, run.count - used));
        for (int i = 0; i < take; ++i) {
          token_[filled + i] = run.first + used + i;
          row_[filled + i] = run.row;
          x_[filled + i] = static_cast<float>(run.x + used + i);
        }
        filled += take;
        used += take;
        if (used == run.count) ++at_run, used = 0;
      }
      attend(batch, head, key, value, count, place, neighbourhood);
    }
    write(batch, head, place);
  }

 private:
  template <class S>
  static const S* at(const void* data, const Strides& strides, int64_t batch, int64_t head) {
    return static_cast<const S*>(data) + batch * strides.batch + head * strides.head;
  }

  static constexpr bool kPairs = Units::kPerUnit == 2;
  // Rows of keys are read where they lie if a row is a row of units.
  bool direct_keys() const {
    return p_.key_strides.channel == 1 && (kPairs ? p_.head_dim % 2 == 0 : std::is_same<T, float>::value);
  }
  bool direct_values() const { return !kPairs && p_.value_strides.channel == 1 && std::is_same<T, float>::value; }

  // Qt: units x queries. Queries beyond the grid's edge are zeros.
  void load_queries(const T* query, const Place<Tile>& place) {
    float* rows = staged_.data();
    for (int q = 0; q < Tile; ++q) {
      float* row = rows + q * query_units_;
      if (place.query[q] < 0) {
        std::memset(row, 0, query_units_ * sizeof(float));
      } else {
        stage(query + place.query[q] * p_.query_strides.token, p_.query_strides.channel, p_.head_dim, row);
        if (sign_ != 1) turn(row);
      }
    }
    transpose(rows, query_units_, Tile, query_units_, query_.data(), Tile);
  }

  // The sign of the scale goes on to the queries, so that the largest score is that of the largest probability. So does
  // a scale of nothing (as this thread's arithmetic sees it), for what hides a pair is an infinity.
  static float sign_of(const Problem& p) {
    return std::fabs(p.scale) * kLog2E == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
  }

  void turn(float* row) const {
    using Number = std::conditional_t<kPairs, T, float>;
    Number* numbers = reinterpret_cast<Number*>(row);
    for (int i = 0; i < p_.head_dim; ++i) from_float(to_float(numbers[i]) * sign_, numbers[i]);
  }

  // One row as units.
  static void stage(const T* from, int64_t step, int count, float* to) {
    if constexpr (kPairs) {
      if (step == 1 && count % 2 == 0) {
        std::memcpy(to, from, count * sizeof(T));
        return;
      }
      T* pairs = reinterpret_cast<T*>(to);
      for (int i = 0; i < count; ++i) pairs[i] = from[i * step];
      if (count % 2) pairs[count] = T{};
    } else if (step == 1) {
      widen_row(from, count, to);
    } else {
      widen(from, step, count, to);
    }
  }

  void attend(int64_t batch, int64_t head, const T* key, const T* value, int count, const Place<Tile>& place,
              const Neighbourhood<Tile>* neighbourhood) {
    const float* rows[kChunk + 1];
    for (int j = 0; j < count; ++j) {
      const T* row = key + token_[j] * p_.key_strides.token;
      if (direct_keys()) {
        rows[j] = reinterpret_cast<const float*>(row);
      } else {
        float* copy = keys_.data() + j * (p_.head_dim + 1);
        stage(row, p_.key_strides.channel, p_.head_dim, copy);
        rows[j] = copy;
      }
    }
    score_product<Units, Tile>(rows, count, query_.data(), query_units_, scores_.data());
    if (p_.form == Form::kDisc)
      normalise<true>(count, neighbourhood, batch, head, place);
    else
      normalise<false>(count, neighbourhood, batch, head, place);
    if constexpr (kPairs) {
      const int pairs = (count + 1) / 2;
      pack_probabilities(count);
      for (int j = 0; j < pairs; ++j) {
        const T* one = value + token_[2 * j] * p_.value_strides.token;
        const T* two = 2 * j + 1 < count ? value + token_[2 * j + 1] * p_.value_strides.token : nullptr;
        float* packed = values_.data() + static_cast<int64_t>(j) * p_.value_dim;
        interleave(one, two, packed);
        rows[j] = packed;
      }
      value_product<Units, Tile>(rows, pairs, scores_.data(), p_.value_dim, out_.data());
    } else {
      for (int j = 0; j < count; ++j) {
        const T* row = value + token_[j] * p_.value_strides.token;
        if (direct_values()) {
          rows[j] = reinterpret_cast<const float*>(row);
        } else {
          float* copy = values_.data() + static_cast<int64_t>(j) * p_.value_dim;
          stage(row, p_.value_strides.channel, p_.value_dim, copy);
          rows[j] = copy;
        }
      }
      value_product<Units, Tile>(rows, count, scores_.data(), p_.value_dim, out_.data());
    }
  }

  // Two rows of values as pairs, channel by channel.
  void interleave(const T* one, const T* two, float* to) const {
    const int64_t step = p_.value_strides.channel;
    uint16_t* pairs = reinterpret_cast<uint16_t*>(to);
    if (step == 1 && two) {
      const uint16_t *a = reinterpret_cast<const uint16_t*>(one), *b = reinterpret_cast<const uint16_t*>(two);
      uint32_t* units = reinterpret_cast<uint32_t*>(to);
      for (int d = 0; d < p_.value_dim; ++d) units[d] = a[d] | static_cast<uint32_t>(b[d]) << 16;
      return;
    }
    for (int d = 0; d < p_.value_dim; ++d) {
      std::memcpy(pairs + 2 * d, one + d * step, 2);
      if (two) std::memcpy(pairs + 2 * d + 1, two + d * step, 2);
      else pairs[2 * d + 1] = 0;
    }
  }

  // Probabilities of two keys per unit, in place.
  void pack_probabilities(int count) {
#if defined(__AVX512BF16__)
    float* p = scores_.data();
    if (count % 2) std::memset(p + count * Tile, 0, Tile * sizeof(float));
    alignas(64) static constexpr uint16_t kPaired[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i paired = _mm512_load_si512(kPaired);
    for (int j = 0; j < (count + 1) / 2; ++j)
      for (int c = 0; c < Tile; c += kLanes) {
        const __m512 low = (__m512)load(p + 2 * j * Tile + c), high = (__m512)load(p + (2 * j + 1) * Tile + c);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // `low` in the lower half; NaN stays NaN
        store(p + j * Tile + c, (Floats)_mm512_permutexvar_epi16(paired, both));
      }
#endif
  }

  // Scores to probabilities relative to the running maximum, which may rise; what is summed so far is scaled to it.
  //
  // The maximum is taken off before anything is multiplied: the largest score's difference is then 0 however large it is,
  // and all others are below. A NaN is never the maximum, and makes its own probability and thereby the sum NaN.
  // Probabilities are smaller by a power of two than they are, so that no sum of values is larger than the largest.
  template <bool Disc>
  void normalise(int count, const Neighbourhood<Tile>* neighbourhood, int64_t batch, int64_t head,
                 const Place<Tile>& place) {
    const bool masked = p_.mask_type != MaskType::kNone;
    if (masked) apply_mask(count, batch, head, place);
    const float factor = masked ? kLog2E : scale_ * kLog2E;
    const Floats hidden = all(-kInfinity);
    for (int c = 0; c < Tile / kLanes; ++c) {
      float* scores = scores_.data() + c * kLanes;
      Floats top = maximum_[c];
      if (neighbourhood != nullptr) {
        const Floats x = load(neighbourhood->x + c * kLanes);
        for (int j = 0; j < count; ++j) {
          Floats score = load(scores + j * Tile);
          if (row_[j] >= 0) {
            const Floats reach = load(neighbourhood->reach.data() + row_[j] * Tile + c * kLanes);
            const Floats distance = x_[j] - x;
            score = (Disc ? distance * distance : larger(distance, -distance)) <= reach ? score : hidden;
            store(scores + j * Tile, score);
          }
          top = larger(score, top);
        }
      } else {
        for (int j = 0; j < count; ++j) top = larger(load(scores + j * Tile), top);
      }
      const Floats base = top == -kInfinity ? all(0.0f) : top;
      const Floats shrink = exp2((maximum_[c] - base) * factor);
      Floats sum = sum_[c] * shrink;
      for (int j = 0; j < count; ++j) {
        const Floats p = exp2((load(scores + j * Tile) - base) * factor, smaller_);
        store(scores + j * Tile, p);
        sum += p;
      }
      sum_[c] = sum;
      maximum_[c] = top;
      for (int d = 0; d < p_.value_dim; ++d) {
        float* out = out_.data() + d * Tile + c * kLanes;
        store(out, load(out) * shrink);
      }
    }
  }

  // Scales the scores and puts the model's own mask on them. What is added in natural units, as masks have it, cannot
  // overflow where theirs does not.
  void apply_mask(int count, int64_t batch, int64_t head, const Place<Tile>& place) {
    const Strides& s = p_.mask_strides;
    const int64_t start = batch * s.batch + head * s.head;
    const auto put = [this](float score, float bias) { return bias == -kInfinity ? bias : score * scale_ + bias; };
    for (int j = 0; j < count; ++j) {
      float* scores = scores_.data() + j * Tile;
      const int64_t column = start + token_[j] * s.channel;
      if (s.token == 0) {
        const float one = bias(column);
        if (one == -kInfinity)
          std::fill_n(scores, Tile, one);
        else
          for (int c = 0; c < Tile; c += kLanes) store(scores + c, load(scores + c) * scale_ + one);
      } else {
        for (int q = 0; q < Tile; ++q)
          scores[q] = put(scores[q], place.query[q] < 0 ? 0.0f : bias(column + place.query[q] * s.token));
      }
    }
  }

  float bias(int64_t index) const {
    switch (p_.mask_type) {
      case MaskType::kBool: return static_cast<const uint8_t*>(p_.mask)[index] ? 0.0f : -kInfinity;
      case MaskType::kFloat: return static_cast<const float*>(p_.mask)[index];
      case MaskType::kBFloat16: return to_float(static_cast<const BFloat16*>(p_.mask)[index]);
      case MaskType::kHalf: return to_float(static_cast<const Half*>(p_.mask)[index]);
      default: return 0.0f;
    }
  }

  // The tile's output; a query that saw no key gives 0.
  void write(int64_t batch, int64_t head, const Place<Tile>& place) {
    for (int c = 0; c < Tile / kLanes; ++c) {
      const Floats factor = maximum_[c] == -kInfinity && sum_[c] == 0.0f ? all(0.0f) : 1.0f / sum_[c];
      for (int d = 0; d < p_.value_dim; ++d) {
        float* out = out_.data() + d * Tile + c * kLanes;
        store(out, load(out) * factor);
      }
    }
    float* rows = staged_.data();
    const int whole = p_.value_dim / kLanes * kLanes;
    for (int q = 0; q < Tile; q += kLanes) {
      for (int d = 0; d < whole; d += kLanes)
        transpose_square(out_.data() + d * Tile + q, Tile, rows + q * p_.value_dim + d, p_.value_dim);
      for (int d = whole; d < p_.value_dim; ++d)
        for (int i = 0; i < kLanes; ++i) rows[(q + i) * p_.value_dim + d] = out_.data()[d * Tile + q + i];
    }
    T* out = static_cast<T*>(p_.out) + batch * p_.out_strides.batch + head * p_.out_strides.head;
    for (int q = 0; q < Tile; ++q)
      if (place.query[q] >= 0)
        narrow(rows + q * p_.value_dim, p_.value_dim, out + place.query[q] * p_.out_strides.token);
  }

  const Problem& p_;
  const float sign_, scale_;  // of the scale: its sign, which the queries have, and its size
  float smaller_;             // probabilities are by 2^-smaller_
  const int query_units_;
  Buffer query_, staged_, scores_, out_, keys_, values_;
  alignas(64) Floats maximum_[Tile / kLanes], sum_[Tile / kLanes];
  int64_t token_[kChunk];
  int row_[kChunk];
  float x_[kChunk];
};

// The whole problem.

template <class T, class Units, int Tile>
class Attention {
 public:
  explicit Attention(const Problem& problem)
      : p_(problem),
        shape_(best_shape(problem, Tile).first),
        before_(problem.before - problem.first),
        others_(problem.queries - problem.image()) {
    for (int i = 0; i < 3; ++i) tiles_[i] = (p_.grid[i] + shape_.size[i] - 1) / shape_.size[i];
    image_tiles_ = tiles_[0] * tiles_[1] * tiles_[2];
    other_tiles_ = (others_ + Tile - 1) / Tile;
  }

  int64_t tasks() const { return p_.batch * p_.heads * (image_tiles_ + other_tiles_); }

  // Per head: the tiles, and the keys that each of them goes through, added up. Takes time by the window's reach, not by
  // the number of tiles: a tile sees the keys at distance 0 on an axis that are its own, and one on each side at every
  // other, as far as the grid goes.
  std::pair<int64_t, int64_t> work_per_head() const {
    const bool disc = p_.form == Form::kDisc;
    const int64_t far = disc ? p_.radius - 1 : p_.radius;
    std::vector<int64_t> at[3];  // keys at each distance from a tile along an axis, over all tiles of that axis
    for (int i = 0; i < 3; ++i)
      for (int64_t d = 0; d <= std::min(far, p_.grid[i] - 1); ++d) {
        const int64_t side = shape_.size[i], beyond = std::min(tiles_[i], (d + side - 1) / side);
        at[i].push_back(d == 0 ? p_.grid[i] : tiles_[i] - beyond + (p_.grid[i] - d) / side);
      }
    for (size_t d = 1; d < at[2].size(); ++d) at[2][d] += at[2][d - 1];
    int64_t keys = 0;
    for (int64_t t = 0; t < std::ssize(at[0]); ++t)
      for (int64_t y = 0; y < std::ssize(at[1]); ++y) {
        const int64_t rest = p_.radius * p_.radius - 1 - t * t - y * y;
        if (disc && rest < 0) break;
        const int64_t wide = disc ? static_cast<int64_t>(std::sqrt(static_cast<double>(rest))) : far;
        keys += at[0][t] * at[1][y] * at[2][std::min<int64_t>(wide, std::ssize(at[2]) - 1)];
      }
    keys += image_tiles_ * (p_.before + p_.after + p_.pooled) + other_tiles_ * p_.tokens();
    return {image_tiles_ + other_tiles_, keys};
  }

  // Works off tasks until none is left; called by several threads at once.
  void work(std::atomic<int64_t>& next) const {
    Worker<T, Units, Tile> worker(p_);
    Neighbourhood<Tile> neighbourhood(p_, shape_);
    Place<Tile> place;
    const int64_t others = p_.batch * p_.heads * other_tiles_;  // these see all keys and come first
    const std::vector<Run> all_keys{{0, p_.tokens(), -1, 0}};
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks();) {
      if (task < others) {
        const int64_t pair = task / other_tiles_, first = task % other_tiles_ * Tile;
        for (int q = 0; q < Tile; ++q) {
          const int64_t other = first + q;
          place.query[q] = other >= others_ ? -1 : other < before_ ? other : other + p_.image();
        }
        worker.run(pair / p_.heads, pair % p_.heads, place, all_keys, nullptr);
      } else {
        const int64_t rest = task - others, pair = rest / image_tiles_, tile = rest % image_tiles_;
        const int64_t low[3] = {tile / (tiles_[1] * tiles_[2]) * shape_.size[0],
                                tile / tiles_[2] % tiles_[1] * shape_.size[1], tile % tiles_[2] * shape_.size[2]};
        neighbourhood.move_to(low, place);
        worker.run(pair / p_.heads, pair % p_.heads, place, neighbourhood.runs, &neighbourhood);
      }
    }
  }

 private:
  const Problem& p_;
  TileShape shape_;
  int64_t before_, others_;  // queries of other tokens: those before the image, all
  int64_t tiles_[3], image_tiles_, other_tiles_;
};

}  // namespace difa
