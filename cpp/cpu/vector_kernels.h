// The operations of ops.h, written once over `Simd`. Each vector_<isa>.cpp includes its simd
// header, then this file, and so compiles its own copy with its own flags.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "../ops.h"

namespace fulcrum {
namespace {

using Vector = Simd::Vector;
constexpr int kWidth = Simd::kWidth;

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and a polynomial of degree 6 for e^r (the coefficients of
// the Taylor series are within 2e-7 relative there). Below the normal range the result is the
// smallest normal number, above it a finite maximum.
inline Vector exp(Vector x) {
  x = Simd::min(Simd::max(x, Simd::set(-87.f)), Simd::set(88.f));
  const Vector n = Simd::round(Simd::mul(x, Simd::set(1.44269504f)));
  Vector r = Simd::fma(n, Simd::set(-0.693359375f), x);
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  Vector p = Simd::set(1.f / 720);
  p = Simd::fma(p, r, Simd::set(1.f / 120));
  p = Simd::fma(p, r, Simd::set(1.f / 24));
  p = Simd::fma(p, r, Simd::set(1.f / 6));
  p = Simd::fma(p, r, Simd::set(0.5f));
  p = Simd::fma(p, r, Simd::set(1.f));
  p = Simd::fma(p, r, Simd::set(1.f));
  return Simd::mul(p, Simd::exp2_integral(n));
}

// Calls op(offset, count) for whole vectors, then for what is left, fewer than a vector.
template <typename Whole, typename Rest>
inline void for_vectors(int n, Whole whole, Rest rest) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) whole(i);
  if (i < n) rest(i, n - i);
}

inline Vector load_part(const float* p, int count) {
  float part[kWidth] = {};
  std::memcpy(part, p, sizeof(float) * count);
  return Simd::load(part);
}

inline void store_part(float* p, Vector v, int count) {
  float part[kWidth];
  Simd::store(part, v);
  std::memcpy(p, part, sizeof(float) * count);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  Vector squares = Simd::zero();
  for_vectors(
      n,
      [&](int i) {
        const Vector v = Simd::load(x + i);
        squares = Simd::fma(v, v, squares);
      },
      [&](int i, int count) {
        const Vector v = load_part(x + i, count);
        squares = Simd::fma(v, v, squares);
      });
  const float inverse = 1.f / std::sqrt(Simd::sum(squares) / static_cast<float>(n) + eps);
  const Vector factor = Simd::set(inverse);
  for_vectors(
      n,
      [&](int i) {
        const Vector normed = Simd::mul(Simd::load(x + i), factor);
        Simd::store(out + i, Simd::mul(normed, Simd::load(weight + i)));
      },
      [&](int i, int count) {
        const Vector normed = Simd::mul(load_part(x + i, count), factor);
        store_part(out + i, Simd::mul(normed, load_part(weight + i, count)), count);
      });
}

void add(float* y, const float* x, int n) {
  for_vectors(
      n, [&](int i) { Simd::store(y + i, Simd::add(Simd::load(y + i), Simd::load(x + i))); },
      [&](int i, int count) {
        store_part(y + i, Simd::add(load_part(y + i, count), load_part(x + i, count)), count);
      });
}

void scale(float* y, float factor, int n) {
  const Vector f = Simd::set(factor);
  for_vectors(
      n, [&](int i) { Simd::store(y + i, Simd::mul(Simd::load(y + i), f)); },
      [&](int i, int count) { store_part(y + i, Simd::mul(load_part(y + i, count), f), count); });
}

inline Vector silu(Vector x) {
  const Vector one = Simd::set(1.f);
  return Simd::div(x, Simd::add(one, exp(Simd::sub(Simd::zero(), x))));
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vector gelu_tanh(Vector x) {
  const Vector cubic = Simd::mul(Simd::mul(x, x), Simd::mul(x, Simd::set(0.044715f)));
  const Vector u = Simd::mul(Simd::set(-2.f * 0.7978845608f), Simd::add(x, cubic));
  return Simd::div(x, Simd::add(Simd::set(1.f), exp(u)));
}

template <typename Function>
inline void gate_with(Function function, const float* gate, const float* up, int n, float* out) {
  for_vectors(
      n,
      [&](int i) {
        Simd::store(out + i, Simd::mul(function(Simd::load(gate + i)), Simd::load(up + i)));
      },
      [&](int i, int count) {
        const Vector activated = function(load_part(gate + i, count));
        store_part(out + i, Simd::mul(activated, load_part(up + i, count)), count);
      });
}

void gate(Activation activation, const float* gate, const float* up, int n, float* out) {
  if (activation == Activation::kSilu) {
    gate_with([](Vector x) { return silu(x); }, gate, up, n, out);
  } else {
    gate_with([](Vector x) { return gelu_tanh(x); }, gate, up, n, out);
  }
}

void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  const auto turn = [&](Vector a, Vector b, Vector c, Vector s, Vector* low, Vector* high) {
    *low = Simd::sub(Simd::mul(a, c), Simd::mul(b, s));
    *high = Simd::add(Simd::mul(b, c), Simd::mul(a, s));
  };
  for_vectors(
      half,
      [&](int i) {
        Vector low, high;
        turn(Simd::load(head + i), Simd::load(head + half + i), Simd::load(cos + i),
             Simd::load(sin + i), &low, &high);
        Simd::store(head + i, low);
        Simd::store(head + half + i, high);
      },
      [&](int i, int count) {
        Vector low, high;
        turn(load_part(head + i, count), load_part(head + half + i, count),
             load_part(cos + i, count), load_part(sin + i, count), &low, &high);
        store_part(head + i, low, count);
        store_part(head + half + i, high, count);
      });
}

// ---- attention ----

constexpr int kSpan = 16;               // floats of a register block: a KV block, a sixteenth of V
constexpr int kParts = kSpan / kWidth;  // vectors in a span
constexpr int kRowGroup = 4;            // rows that share each load of K and V
static_assert(kSpan == kBlockSize);

// Per-tile state, in the thread's scratch memory.
struct Tile {
  float* scores;   // (rows, kAttentionChunk): scores, then probabilities
  float* sums;     // (rows, head_dim): values weighted so far
  float* maximum;  // (rows,)
  float* total;    // (rows,): sum of probabilities so far
  int num_rows;
};

inline const float* query_row(const AttentionUnit& unit, int row) {
  const int token = row / unit.num_heads, head = row % unit.num_heads;
  return unit.queries + token * unit.ld_queries + head * unit.head_dim;
}

// scores[row, 0:16] = query[row] · keys of one block, for kRows rows.
template <int kRows>
inline void score_block(const AttentionUnit& unit, const Tile& tile, int row, const uint16_t* keys,
                        int column) {
  const float* queries[kRows];
  Vector acc[kRows][kParts];
  for (int r = 0; r < kRows; ++r) {
    queries[r] = query_row(unit, row + r);
    for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::zero();
  }
  for (int d = 0; d < unit.head_dim; ++d) {
    Vector key[kParts];
    for (int p = 0; p < kParts; ++p) key[p] = Simd::load_bf16(keys + d * kSpan + p * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vector q = Simd::set(queries[r][d]);
      for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::fma(q, key[p], acc[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.scores + (row + r) * kAttentionChunk + column;
    for (int p = 0; p < kParts; ++p) Simd::store(out + p * kWidth, acc[r][p]);
  }
}

// sums[row, span] = sums * correction + probabilities · values of the chunk, for kRows rows.
template <int kRows>
inline void weigh_values(const AttentionUnit& unit, const Tile& tile, int row, int span,
                         const float* corrections, const uint16_t* const* blocks, int num_keys) {
  Vector acc[kRows][kParts];
  for (int r = 0; r < kRows; ++r) {
    const float* sums = tile.sums + (row + r) * unit.head_dim + span;
    const Vector correction = Simd::set(corrections[r]);
    for (int p = 0; p < kParts; ++p) {
      acc[r][p] = Simd::mul(Simd::load(sums + p * kWidth), correction);
    }
  }
  for (int key = 0; key < num_keys; ++key) {
    const uint16_t* values = blocks[key / kBlockSize] + (key % kBlockSize) * unit.head_dim + span;
    Vector value[kParts];
    for (int p = 0; p < kParts; ++p) value[p] = Simd::load_bf16(values + p * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = Simd::set(tile.scores[(row + r) * kAttentionChunk + key]);
      for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::fma(weight, value[p], acc[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* sums = tile.sums + (row + r) * unit.head_dim + span;
    for (int p = 0; p < kParts; ++p) Simd::store(sums + p * kWidth, acc[r][p]);
  }
}

// Scores of one row to probabilities, unseen keys to zero; returns the factor for the row's
// former sums. `low` and `high` are the chunk's columns that the row sees, high exclusive.
inline float soften_row(const Tile& tile, int row, int low, int high, int num_columns) {
  float* scores = tile.scores + row * kAttentionChunk;
  if (low >= high) {
    std::fill(scores, scores + num_columns, 0.f);
    return 1.f;
  }
  std::fill(scores, scores + low, -FLT_MAX);
  std::fill(scores + high, scores + num_columns, -FLT_MAX);
  Vector largest = Simd::set(-FLT_MAX);
  for (int i = 0; i < num_columns; i += kWidth) {
    largest = Simd::max(largest, Simd::load(scores + i));
  }
  const float former = tile.maximum[row];
  const float maximum = std::max(former, Simd::max_of(largest));
  const Vector shift = Simd::set(maximum);
  for (int i = 0; i < num_columns; i += kWidth) {
    Simd::store(scores + i, exp(Simd::sub(Simd::load(scores + i), shift)));
  }
  std::fill(scores, scores + low, 0.f);
  std::fill(scores + high, scores + num_columns, 0.f);
  Vector sum = Simd::zero();
  for (int i = 0; i < num_columns; i += kWidth) sum = Simd::add(sum, Simd::load(scores + i));
  float difference[kWidth] = {former - maximum};
  float factor[kWidth];
  Simd::store(factor, exp(Simd::load(difference)));
  tile.maximum[row] = maximum;
  tile.total[row] = tile.total[row] * factor[0] + Simd::sum(sum);
  return factor[0];
}

// Calls op.template operator()<n>(row) for groups of kRowGroup rows, then for those left.
template <typename Op>
inline void for_row_groups(int num_rows, Op op) {
  int row = 0;
  for (; row + kRowGroup <= num_rows; row += kRowGroup) op.template operator()<kRowGroup>(row);
  switch (num_rows - row) {
    case 3:
      op.template operator()<3>(row);
      break;
    case 2:
      op.template operator()<2>(row);
      break;
    case 1:
      op.template operator()<1>(row);
      break;
    default:
      break;
  }
}

void attend_chunk(const AttentionUnit& unit, const Tile& tile, int chunk_begin, int num_keys) {
  const int num_blocks = (num_keys + kBlockSize - 1) / kBlockSize;
  const int32_t* table = unit.block_table + chunk_begin / kBlockSize;
  const uint16_t* value_blocks[kAttentionChunk / kBlockSize];
  for (int b = 0; b < num_blocks; ++b) {
    const uint16_t* keys = unit.keys + table[b] * unit.block_stride;
    value_blocks[b] = unit.values + table[b] * unit.block_stride;
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      score_block<kRows>(unit, tile, row, keys, b * kBlockSize);
    });
  }
  float corrections[kMaxTileRows];
  for (int row = 0; row < tile.num_rows; ++row) {
    const int position = unit.first_position + row / unit.num_heads;
    const int first_seen = unit.window > 0 ? position - unit.window + 1 : 0;
    const int low = std::max(first_seen - chunk_begin, 0);
    const int high = std::min(position + 1 - chunk_begin, num_keys);
    corrections[row] =
        soften_row(tile, row, std::min(low, num_keys), std::max(high, 0), num_blocks * kBlockSize);
  }
  for (int span = 0; span < unit.head_dim; span += kSpan) {
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      weigh_values<kRows>(unit, tile, row, span, corrections + row, value_blocks, num_keys);
    });
  }
}

void attend(const AttentionUnit& unit, float* scratch) {
  Tile tile;
  tile.num_rows = unit.num_tokens * unit.num_heads;
  tile.scores = scratch;
  tile.sums = tile.scores + kMaxTileRows * kAttentionChunk;
  tile.maximum = tile.sums + int64_t{kMaxTileRows} * unit.head_dim;
  tile.total = tile.maximum + kMaxTileRows;
  std::fill(tile.sums, tile.sums + int64_t{tile.num_rows} * unit.head_dim, 0.f);
  std::fill(tile.maximum, tile.maximum + tile.num_rows, -FLT_MAX);
  std::fill(tile.total, tile.total + tile.num_rows, 0.f);

  const int end = unit.first_position + unit.num_tokens;
  const int first_seen = unit.window > 0 ? std::max(unit.first_position - unit.window + 1, 0) : 0;
  for (int begin = first_seen / kAttentionChunk * kAttentionChunk; begin < end;
       begin += kAttentionChunk) {
    attend_chunk(unit, tile, begin, std::min(kAttentionChunk, end - begin));
  }
  for (int row = 0; row < tile.num_rows; ++row) {
    const int token = row / unit.num_heads, head = row % unit.num_heads;
    float* out = unit.out + token * unit.ld_out + head * unit.head_dim;
    const Vector inverse = Simd::set(1.f / tile.total[row]);
    for (int d = 0; d < unit.head_dim; d += kWidth) {
      Simd::store(out + d, Simd::mul(Simd::load(tile.sums + row * unit.head_dim + d), inverse));
    }
  }
}

}  // namespace
}  // namespace fulcrum
