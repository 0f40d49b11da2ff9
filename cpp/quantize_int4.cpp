#include "quantize_int4.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "formats/float16.h"

namespace fulcrum {
namespace {

// Four floats: vectors of the compiler, so that the search is fast without an instruction set.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

constexpr int kMaxVectors = kMaxInt4Group / 4;
constexpr int kMaxRefits = 4;

float sum_lanes(Float4 v) { return v[0] + v[1] + (v[2] + v[3]); }

Float4 splat(float value) { return Float4{value, value, value, value}; }

struct Candidate {
  float scale;
  float minimum;
  float error;                 // sum of squared differences
  Float4 quants[kMaxVectors];  // whole numbers 0…15
};

// Rounds scale and minimum to fp16, then the values to the grid that these give.
void evaluate(const Float4* values, int num_vectors, float scale, float minimum, Candidate* out) {
  out->scale = round_to_half(scale);
  out->minimum = round_to_half(minimum);
  const Float4 step = splat(out->scale), low = splat(out->minimum);
  const Float4 inverse = splat(out->scale != 0.0f ? 1.0f / out->scale : 0.0f);
  const Float4 half = splat(0.5f), zero = splat(0.0f), top = splat(15.0f);
  Float4 error = zero;
  for (int i = 0; i < num_vectors; ++i) {
    Float4 level = (values[i] - low) * inverse + half;
    level = level > zero ? level : zero;
    level = level < top ? level : top;
    const Float4 quant = __builtin_convertvector(__builtin_convertvector(level, Int4), Float4);
    const Float4 difference = step * quant + low - values[i];
    error += difference * difference;
    out->quants[i] = quant;
  }
  out->error = sum_lanes(error);
}

// The line through (quant, value) with the least squared error. False where it does not rise.
bool fit_line(const Float4* values, int num_vectors, const Float4* quants, float* scale,
              float* minimum) {
  Float4 sums[4] = {};
  for (int i = 0; i < num_vectors; ++i) {
    sums[0] += quants[i];
    sums[1] += quants[i] * quants[i];
    sums[2] += values[i];
    sums[3] += quants[i] * values[i];
  }
  const float sum_q = sum_lanes(sums[0]), sum_qq = sum_lanes(sums[1]);
  const float sum_v = sum_lanes(sums[2]), sum_qv = sum_lanes(sums[3]);
  const float count = 4.0f * static_cast<float>(num_vectors);
  const float determinant = count * sum_qq - sum_q * sum_q;
  if (determinant <= 0.0f) return false;
  *scale = (count * sum_qv - sum_q * sum_v) / determinant;
  *minimum = (sum_v - *scale * sum_q) / count;
  return *scale > 0.0f;
}

// The same through the origin at quant 8.
bool fit_symmetric(const Float4* values, int num_vectors, const Float4* quants, float* scale) {
  Float4 sums[2] = {};
  const Float4 zero_point = splat(8.0f);
  for (int i = 0; i < num_vectors; ++i) {
    const Float4 level = quants[i] - zero_point;
    sums[0] += level * level;
    sums[1] += level * values[i];
  }
  const float sum_qq = sum_lanes(sums[0]);
  if (sum_qq <= 0.0f) return false;
  *scale = sum_lanes(sums[1]) / sum_qq;
  return *scale != 0.0f;
}

// Keeps the better of two candidates in *best.
void keep_better(Candidate** best, Candidate** other) {
  if ((*other)->error < (*best)->error) std::swap(*best, *other);
}

// Narrower ranges than that of the values trade a larger error at the ends for a finer step.
constexpr float kWidths[] = {0.92f, 0.84f, 0.76f};

void try_ranges(const Float4* values, int num_vectors, Candidate** best, Candidate** other) {
  Float4 lows = values[0], highs = values[0];
  for (int i = 1; i < num_vectors; ++i) {
    lows = values[i] < lows ? values[i] : lows;
    highs = values[i] > highs ? values[i] : highs;
  }
  const float low = std::min(std::min(lows[0], lows[1]), std::min(lows[2], lows[3]));
  const float high = std::max(std::max(highs[0], highs[1]), std::max(highs[2], highs[3]));
  const float center = low / 2 + high / 2, range = high / 15 - low / 15;
  evaluate(values, num_vectors, range, low, *best);
  for (const float width : kWidths) {
    const float step = range * width;
    evaluate(values, num_vectors, step, center - 7.5f * step, *other);
    keep_better(best, other);
  }
}

// The minimum follows from the scale as it is stored, so that the grid is that of the format.
void evaluate_symmetric(const Float4* values, int num_vectors, float scale, Candidate* out) {
  const float stored = round_to_half(scale);
  evaluate(values, num_vectors, stored, -8.0f * stored, out);
}

// The largest value sits at quant 0, eight steps from zero, whatever its sign.
void try_symmetric_ranges(const Float4* values, int num_vectors, Candidate** best,
                          Candidate** other) {
  float largest = 0.0f;
  for (int i = 0; i < 4 * num_vectors; ++i) {
    const float value = values[i / 4][i % 4];
    if (std::max(value, -value) > std::max(largest, -largest)) largest = value;
  }
  evaluate_symmetric(values, num_vectors, largest / -8.0f, *best);
  for (const float width : kWidths) {
    evaluate_symmetric(values, num_vectors, largest * width / -8.0f, *other);
    keep_better(best, other);
  }
}

}  // namespace

// Tries some ranges, the full one first, then refits the best to its quants as long as that helps
// (Lloyd's iteration).
void quantize_group_int4(const float* group, int size, bool is_symmetric, uint8_t* quants,
                         float* scale, float* minimum) {
  const int num_vectors = size / 4;
  Float4 values[kMaxVectors];
  std::memcpy(values, group, size * sizeof(float));
  Candidate candidates[2];
  Candidate *best = &candidates[0], *other = &candidates[1];
  const auto try_all = is_symmetric ? try_symmetric_ranges : try_ranges;
  try_all(values, num_vectors, &best, &other);
  for (int refit = 0; refit < kMaxRefits; ++refit) {
    float fitted_scale, fitted_minimum;
    if (is_symmetric) {
      if (!fit_symmetric(values, num_vectors, best->quants, &fitted_scale)) break;
      evaluate_symmetric(values, num_vectors, fitted_scale, other);
    } else {
      if (!fit_line(values, num_vectors, best->quants, &fitted_scale, &fitted_minimum)) break;
      evaluate(values, num_vectors, fitted_scale, fitted_minimum, other);
    }
    if (!(other->error < best->error)) break;
    std::swap(best, other);
  }
  for (int i = 0; i < size; ++i) quants[i] = static_cast<uint8_t>(best->quants[i / 4][i % 4]);
  *scale = best->scale;
  *minimum = best->minimum;
}

}  // namespace fulcrum
