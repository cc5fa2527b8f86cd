// The sequences that count at a time step, and the normalisation of rows by mean and variance.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "vectors.h"

namespace {

// A mask of the sequences that count.
struct Counted {
  std::vector<Mask> lanes;
  int first = 0;    // the first sequence that counts
  float share = 0;  // 1 / the number of sequences that count; 0 if none does

  void set(const uint8_t* flags, int flag, int batch) {
    int count = 0;
    first = 0;
    for (int b = batch - 1; b >= 0; --b) {
      const bool counts = flags == nullptr || flags[b] & flag;
      lanes[b / kLanes][b % kLanes] = counts ? -1 : 0;
      count += counts;
      if (counts) first = b;
    }
    share = count ? 1.f / count : 0;
  }
};

struct Masks {
  Counted valid, input, recurrent, cell, all;

  Masks(int vectors, int batch) {
    for (Counted* each : {&valid, &input, &recurrent, &cell, &all}) {
      each->lanes.resize(vectors, Mask{});
      each->set(nullptr, 0, batch);
    }
  }
  void set(const uint8_t* flags, int batch) {
    valid.set(flags, kValid, batch);
    input.set(flags, kInInput, batch);
    recurrent.set(flags, kInRecurrent, batch);
    cell.set(flags, kInCell, batch);
  }
};

// A number for each of N rows of a unit: 1 for the cell, 4 for the gates.
template <int N>
using Each = std::conditional_t<N == 1, float, Four>;

INLINE float total_of(const Vector (&x)[1]) { return total(x[0]); }
INLINE Four total_of(const Vector (&x)[4]) { return totals(x); }
INLINE float root(float x) { return std::sqrt(x); }
INLINE Four root(Four x) {
  for (int n = 0; n < 4; ++n) x[n] = std::sqrt(x[n]);
  return x;
}
INLINE float element(float x, int) { return x; }
INLINE float element(Four x, int n) { return x[n]; }

// Reads the numbers of a unit from an array [F]: element u, or elements gH + u for the gates g.
template <int N>
INLINE Each<N> gather(const float* from, int64_t unit, int64_t units) {
  if constexpr (N == 1)
    return from[unit];
  else
    return Four{from[unit], from[units + unit], from[2 * units + unit], from[3 * units + unit]};
}
template <int N>
INLINE void scatter(float* to, int64_t unit, int64_t units, Each<N> x) {
  if constexpr (N == 1)
    to[unit] = x;
  else
    for (int n = 0; n < 4; ++n) to[n * units + unit] = x[n];
}

// Normalises N rows to slope * (x - mean). The default leaves them unchanged.
template <int N>
struct Moments {
  Each<N> mean = Each<N>{}, inverse = Each<N>{} + 1, slope = Each<N>{} + 1;

  Moments() = default;
  INLINE Moments(Each<N> mean, Each<N> variance, Each<N> scale, float epsilon)
      : mean(mean), inverse(1 / root(variance + epsilon)), slope(scale * inverse) {}
};

// Mean and variance of N rows, `width` apart, over the sequences that count; zero if none does.
// Both loops subtract the value of the first such sequence, so that the mean of equal values is
// exact.
template <int N>
INLINE void batch_moments(const float* x, int width, const Counted& counted, Each<N>& mean,
                          Each<N>& variance) {
  Vector sums[N] = {}, squares[N] = {}, origins[N], offsets[N];
  for (int n = 0; n < N; ++n) origins[n] = broadcast(x[n * width + counted.first]);
  for (int i = 0; i < width; i += kLanes)
    for (int n = 0; n < N; ++n)
      sums[n] += where(counted.lanes[i / kLanes], load(x + n * width + i) - origins[n]);
  const Each<N> offset = total_of(sums) * counted.share;
  for (int n = 0; n < N; ++n) offsets[n] = broadcast(element(offset, n));
  for (int i = 0; i < width; i += kLanes)
    for (int n = 0; n < N; ++n) {
      const Vector deviation = (load(x + n * width + i) - origins[n]) - offsets[n];
      squares[n] += where(counted.lanes[i / kLanes], deviation * deviation);
    }
  variance = total_of(squares) * counted.share;
  if constexpr (N == 1)
    mean = origins[0][0] + offset;
  else
    mean = Four{origins[0][0], origins[1][0], origins[2][0], origins[3][0]} + offset;
  if (counted.share == 0) mean = Each<N>{};
}

// Moments from the statistics of a time step; the default if the term is not normalised.
template <int N>
INLINE Moments<N> known_moments(const Term& term, int64_t t, int64_t unit, int64_t units) {
  if (!term.normalized) return {};
  const float* statistics = term.statistics + t * 2 * N * units;
  return {gather<N>(statistics, unit, units), gather<N>(statistics + N * units, unit, units),
          gather<N>(term.scale, unit, units), term.epsilon};
}

// The part of a gradient that flows through moments of the batch; zero by default. If d is the
// gradient of slope * (x - moments.mean): d_x = slope * (d - mean - (x - moments.mean) * tilt).
template <int N>
struct Correction {
  Each<N> mean = Each<N>{}, tilt = Each<N>{};
};

// The pre-activations of a gate, from its recurrent and input terms.
INLINE Vector pre_activation(int gate, const Moments<4>& r, Vector recurrent, const Moments<4>& x,
                             Vector input, Four bias) {
  return (recurrent - r.mean[gate]) * r.slope[gate] + (input - x.mean[gate]) * x.slope[gate] +
         bias[gate];
}

// The gradient of a gate's terms x, from the gradient d of its pre-activations.
INLINE Vector term_backward(int gate, Vector d, Vector x, const Moments<4>& of,
                            const Correction<4>& off) {
  return (d - off.mean[gate] - (x - of.mean[gate]) * off.tilt[gate]) * of.slope[gate];
}

}  // namespace
