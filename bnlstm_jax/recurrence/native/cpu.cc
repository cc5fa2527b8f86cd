// The recurrence of an LSTM over all time steps on a CPU, forward and backward, with batch
// normalization of its terms: equations 1 to 3, or 6 to 8, of "Recurrent Batch Normalization". The
// Python caller says what the arguments are.
//
// A thread owns hidden units for the whole batch and for all steps, so that statistics are sums
// within a thread. It packs its part of the recurrent kernel once. Threads exchange the hidden state
// (backward: the gradient of the recurrent term) once a step, and one barrier separates the steps.
// Each number is computed by one thread, in an order that does not depend on how many there are.
//
// Arrays [T, B, F] of the caller have the batch as their first axis in memory.
//
// Within a call rows are [feature, batch]: a row is one feature, or unit, of the whole batch, padded
// to whole vectors, with zeros. The four rows of a unit, one a gate, follow each other: row 4u + g is
// column gH + u of a kernel. Gradients are named d_*.

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "products.h"
#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kGates = 4;  // forget, input, output, candidate
// Inputs of fewer features have gradients of their kernel row by row; those of others are products.
constexpr int kFewFeatures = 8;
// A row of the batch at a step: it is not past its end; it counts in the statistics of the terms.
enum Flag : uint8_t { kValid = 1, kInRecurrent = 2, kInCell = 4, kInInput = 8 };

// What the input term of a step is computed from.
enum class Source {
  kInputs,   // [T, B, D], multiplied by a kernel
  kSymbols,  // [T, B], rows of a kernel
  kTerms,    // the terms themselves, [T, B, 4H]
};

// Statistics of a normalised term, [T, 2, F]: mean and variance.
struct Term {
  bool normalized = false;
  float epsilon = 0;
  const float* scale = nullptr;   // [F]
  float* statistics = nullptr;    // given, or those of the batch
  float* d_scale = nullptr;       // [F]
  float* d_statistics = nullptr;  // [T, 2, F] if given
};

struct Arguments {
  int64_t steps, batch, units;
  int64_t features;  // D, or the number of symbols, or 4H
  Source source;
  bool given;  // statistics are given; otherwise they are the batch's, and are outputs
  bool keep;   // write what the backward pass needs
  const float* kernel;        // [H, 4H]
  const float* input_kernel;  // [D, 4H]
  const float* bias;          // [4H]
  const float* cell_bias;     // [H]
  const float* inputs;        // [T, B, D] or [T, B, 4H]
  const int32_t* symbols;     // [T, B]
  const uint8_t* flags;       // [T, B]; null if all rows are valid
  const float* first_cell;    // [B, H]
  const float* first_hidden;  // [B, H]
  Term input, recurrent, cell_term;
  // Outputs of the forward pass, inputs of the backward pass.
  float* hidden;          // [T, B, H]
  float* last_cell;       // [B, H]
  float* cell;            // [T, H, B]
  float* recurrent_term;  // [T, H, 4, B]
  // Gradients of the outputs, then those that the backward pass computes.
  const float* d_hidden;     // [T, B, H], the last carry's h included
  const float* d_last_cell;  // [B, H]
  float* d_kernel;           // [H, 4H]
  float* d_input_kernel;     // [D, 4H]
  float* d_bias;             // [4H]
  float* d_cell_bias;        // [H]
  float* d_inputs;           // [T, B, D] or [T, B, 4H]
  float* d_first_cell;       // [B, H]
  float* d_first_hidden;     // [B, H]

  int64_t gates() const { return kGates * units; }
  bool dense() const { return source == Source::kInputs; }
  // Whether the sum of both terms is kept in place of the recurrent term.
  bool merged() const { return !recurrent.normalized && !input.normalized; }
};

// ---- Memory.

// Asks for large pages, and for a thread's share of them at once: a page costs as much as the
// computation that fills it, and all threads would wait for whoever meets the next one.
void advise_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kHuge = size_t{1} << 21;
  const size_t start = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const size_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void populate(const void* data, size_t bytes, int thread, int threads) {
#if defined(MADV_POPULATE_WRITE)
  constexpr size_t kHuge = size_t{1} << 21;
  const size_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge;
  const size_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge;
  if (first >= last) return;
  const size_t start = first + (last - first) * thread / threads;
  const size_t end = first + (last - first) * (thread + 1) / threads;
  madvise(reinterpret_cast<void*>(start * kHuge), (end - start) * kHuge, MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes, (void)thread, (void)threads;
#endif
}

// Zeros, or whatever there is, aligned to cache lines.
class Floats {
 public:
  explicit Floats(size_t size, bool zeros = true) {
    const size_t bytes = (std::max<size_t>(size, 1) * 4 + 63) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_.get(), bytes);
    if (zeros) std::memset(data_.get(), 0, bytes);
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ---- Rows of a step.

// Which rows of the batch count for something.
struct Counted {
  std::vector<Mask> lanes;
  int first = 0;
  float share = 0;  // of one row: 1 / the number of rows; 0 if there are none

  void set(const uint8_t* flags, int flag, int batch) {
    int32_t* words = reinterpret_cast<int32_t*>(lanes.data());
    int count = 0;
    first = 0;
    for (int b = batch - 1; b >= 0; --b) {
      const bool counts = flags == nullptr || flags[b] & flag;
      words[b] = counts ? -1 : 0;
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

// A number for each of N rows: of a cell's, or of the gates' four.
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

// The numbers of a unit in an array [F]: at column gH + u for gates g.
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

// How N rows are normalised: to slope * (x - mean). By default they are not.
template <int N>
struct Moments {
  Each<N> mean = Each<N>{}, inverse = Each<N>{} + 1, slope = Each<N>{} + 1;

  Moments() = default;
  INLINE Moments(Each<N> mean, Each<N> variance, Each<N> scale, float epsilon)
      : mean(mean), inverse(1 / root(variance + epsilon)), slope(scale * inverse) {}
};

// Mean and variance of N rows, `width` apart. Both passes measure from the first row of the batch
// that counts: the mean of equal values is each of them. They are zero if no row counts.
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

// What the gradient of slope * (x - mean) takes off that of its result, by moments of the batch:
// d_x = slope * (d - mean - (x - moments.mean) * tilt). By default nothing.
template <int N>
struct Correction {
  Each<N> mean = Each<N>{}, tilt = Each<N>{};
};

// ---- What threads share.

struct Shared {
  const Arguments& a;
  const int threads;
  const int width;  // of a row
  const Panels panels;
  Barrier barrier;
  // Two buffers each, used in turn: hidden states (backward: gradients of recurrent terms), inputs,
  // gradients of input terms.
  const int64_t rows, input_rows, d_input_rows;
  Floats state, inputs, d_inputs;

  Shared(const Arguments& a, int threads, bool backward)
      : a(a),
        threads(threads),
        width(round_up(a.batch)),
        panels(width / kLanes),
        barrier(threads),
        rows(backward ? a.gates() : a.units),
        input_rows(a.dense() ? a.features : 0),
        d_input_rows(backward && a.dense() && !a.merged() ? a.gates() : 0),
        state(2 * rows * width),
        inputs(2 * input_rows * width),
        d_inputs(2 * d_input_rows * width) {}

  PanelMatrix buffer(const Floats& floats, int64_t rows, int64_t turn) const {
    return {floats.get() + turn % 2 * rows * width, panels, static_cast<size_t>(rows)};
  }
  PanelMatrix state_at(int64_t t) const { return buffer(state, rows, t); }
  PanelMatrix inputs_at(int64_t t) const { return buffer(inputs, input_rows, t); }
  PanelMatrix d_inputs_at(int64_t t) const { return buffer(d_inputs, d_input_rows, t); }
};

// ---- What a thread has in either pass.

struct Own {
  Shared& shared;
  const Arguments& a;
  const int width;
  const int64_t first, units;             // hidden units
  const int64_t first_feature, features;  // of the inputs that it brings into rows
  Masks masks;
  std::vector<int32_t> symbols;  // of a step; those unknown are the last column of their kernel
  Floats packed, packed_inputs;  // kernels
  Floats input_terms;            // rows [4U]; zeros where the recurrent terms hold them
  Floats input_rows;

  Own(Shared& shared, int thread)
      : shared(shared),
        a(shared.a),
        width(shared.width),
        first(a.units * thread / shared.threads),
        units(a.units * (thread + 1) / shared.threads - first),
        first_feature(shared.input_rows * thread / shared.threads),
        features(shared.input_rows * (thread + 1) / shared.threads - first_feature),
        masks(width / kLanes, a.batch),
        symbols(a.batch),
        packed(gates() * a.units, false),
        packed_inputs(gates() * input_columns(), false),
        input_terms(gates() * width),
        input_rows(features * width) {}

  int64_t gates() const { return kGates * units; }
  // Columns of a row of the input kernel, transposed; symbols have one more, of NaN.
  int64_t input_columns() const {
    if (a.source == Source::kTerms) return 0;
    return a.dense() ? a.features : round_up(a.features + 1);
  }
  // The column of a kernel that is a row of terms, of all units.
  int64_t column(int64_t row) const { return row % kGates * a.units + row / kGates; }

  void pack_input_kernel() {
    const auto element = [&](int64_t row, int64_t k) {
      return a.input_kernel[k * a.gates() + column(kGates * first + row)];
    };
    if (a.dense()) pack(packed_inputs.get(), gates(), a.features, element);
    if (a.source != Source::kSymbols) return;
    for (int64_t row = 0; row < gates(); ++row) {
      float* to = packed_inputs.get() + row * input_columns();
      for (int64_t k = 0; k < a.features; ++k) to[k] = element(row, k);
      to[a.features] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  // Brings some features of a step, of an array [T, B, size], into rows, and back.
  void to_rows(float* rows, const float* array, int64_t t, int64_t size, int64_t first,
               int64_t features) const {
    transpose(rows, width, array + t * size + first, a.steps * size, a.batch, features);
  }
  void from_rows(float* array, const float* rows, int64_t t, int64_t size, int64_t first,
                 int64_t features) const {
    transpose(array + t * size + first, a.steps * size, rows, width, features, a.batch);
  }
  // Brings the thread's units of a state [B, H] into rows, and back.
  void to_rows(float* rows, const float* state) const {
    transpose(rows, width, state + first, a.units, a.batch, units);
  }
  void from_rows(float* state, const float* rows) const {
    transpose(state + first, a.units, rows, width, units, a.batch);
  }

  // Brings the thread's share of a step's inputs into rows, for all threads.
  void share_inputs(int64_t t) {
    if (features == 0) return;
    to_rows(input_rows.get(), a.inputs, t, a.features, first_feature, features);
    const PanelMatrix inputs = shared.inputs_at(t);
    for (int64_t d = 0; d < features; ++d)
      inputs.write_row(first_feature + d, input_rows.get() + d * width);
  }

  // What belongs to a step alone.
  void enter(int64_t t) {
    if (a.flags != nullptr) masks.set(a.flags + t * a.batch, a.batch);
    if (a.source != Source::kSymbols) return;
    for (int64_t b = 0; b < a.batch; ++b) {
      const int32_t symbol = a.symbols[t * a.batch + b];
      symbols[b] = symbol < 0 || symbol >= a.features ? a.features : symbol;
    }
  }

  void compute_input_terms(int64_t t) {
    if (a.dense()) {
      const LeftMatrix kernel = {packed_inputs.get(), static_cast<size_t>(a.features), true};
      multiply(kernel, gates(), shared.inputs_at(t), a.features, input_terms.get(), width);
    } else if (a.source == Source::kSymbols) {
      for (int64_t row = 0; row < gates(); ++row) {
        const float* from = packed_inputs.get() + row * input_columns();
        float* to = input_terms.get() + row * width;
        for (int64_t b = 0; b < a.batch; ++b) to[b] = from[symbols[b]];
      }
    } else {
      for (int gate = 0; gate < kGates; ++gate)
        transpose(input_terms.get() + gate * width, kGates * width,
                  a.inputs + t * a.gates() + gate * a.units + first, a.steps * a.gates(), a.batch,
                  units);
    }
  }
};

// A step of so many units is done in stages: what a stage of one unit waits for, a sum over the
// batch, is there by the time that the next stage needs it.
constexpr int kUnits = 4;

// ---- The forward pass.

struct Forward : Own {
  const int thread;
  Floats terms, cells, hidden;  // rows of the thread's units
  Floats output_gates, zeros;   // rows of kUnits units; of one

  Forward(Shared& shared, int thread)
      : Own(shared, thread),
        thread(thread),
        terms(gates() * width),
        cells(units * width),
        hidden(units * width),
        output_gates(kUnits * width),
        zeros(kGates * width) {}

  void run() {
    const size_t states = 4 * a.steps * a.batch * a.units;
    populate(a.hidden, states, thread, shared.threads);
    if (a.keep) {
      populate(a.cell, states, thread, shared.threads);
      populate(a.recurrent_term, kGates * states, thread, shared.threads);
    }
    pack(packed.get(), gates(), a.units, [&](int64_t row, int64_t k) {
      return a.kernel[k * a.gates() + column(kGates * first + row)];
    });
    pack_input_kernel();
    to_rows(cells.get(), a.first_cell);
    to_rows(hidden.get(), a.first_hidden);
    for (int64_t u = 0; u < units; ++u)
      shared.state_at(0).write_row(first + u, hidden.get() + u * width);
    share_inputs(0);
    shared.barrier.wait(shared.barrier.arrive());
    const LeftMatrix kernel = {packed.get(), static_cast<size_t>(a.units), true};
    for (int64_t t = 0; t < a.steps; ++t) {
      enter(t);
      multiply(kernel, gates(), shared.state_at(t), a.units, terms.get(), width);
      compute_input_terms(t);
      for (int64_t u = 0; u < units; u += kUnits) step(t, u, std::min(u + kUnits, units));
      if (t + 1 < a.steps) share_inputs(t + 1);
      const unsigned turn = shared.barrier.arrive();
      from_rows(a.hidden, hidden.get(), t, a.units, first, units);
      shared.barrier.wait(turn);
    }
    from_rows(a.last_cell, cells.get());
  }

  template <int N>
  INLINE Moments<N> moments(const Term& term, const float* x, const Counted& counted, int64_t t,
                            int64_t unit) {
    if (!term.normalized) return {};
    float* statistics = term.statistics + t * 2 * N * a.units;
    Each<N> mean, variance;
    if (a.given) {
      mean = gather<N>(statistics, unit, a.units);
      variance = gather<N>(statistics + N * a.units, unit, a.units);
    } else {
      batch_moments<N>(x, width, counted, mean, variance);
      scatter<N>(statistics, unit, a.units, mean);
      scatter<N>(statistics + N * a.units, unit, a.units, variance);
    }
    return {mean, variance, gather<N>(term.scale, unit, a.units), term.epsilon};
  }

  // A step of units `start` to `end`.
  void step(int64_t t, int64_t start, int64_t end) {
    Moments<4> r[kUnits], x[kUnits];
    Moments<1> m[kUnits];
    for (int64_t u = start; u < end; ++u) {
      const int64_t unit = first + u;
      float* recurrent = terms.get() + kGates * u * width;
      const float* input = input_terms.get() + kGates * u * width;
      if (a.merged()) {
        for (int i = 0; i < kGates * width; i += kLanes)
          store(recurrent + i, load(recurrent + i) + load(input + i));
      }
      if (a.keep) {
        float* kept = a.recurrent_term + (t * a.units + unit) * kGates * a.batch;
        for (int gate = 0; gate < kGates; ++gate)
          copy(kept + gate * a.batch, recurrent + gate * width, a.batch);
      }
      r[u - start] = moments<4>(a.recurrent, recurrent, masks.recurrent, t, unit);
      x[u - start] = moments<4>(a.input, input, masks.input, t, unit);
    }
    for (int64_t u = start; u < end; ++u)
      apply_gates(u, r[u - start], x[u - start], output_gates.get() + (u - start) * width);
    for (int64_t u = start; u < end; ++u) {
      const float* c = cells.get() + u * width;
      if (a.keep) copy(a.cell + (t * a.units + first + u) * a.batch, c, a.batch);
      m[u - start] = moments<1>(a.cell_term, c, masks.cell, t, first + u);
    }
    for (int64_t u = start; u < end; ++u) {
      const float *c = cells.get() + u * width, *o = output_gates.get() + (u - start) * width;
      float* h = hidden.get() + u * width;
      const Moments<1>& of = m[u - start];
      const float bias = a.cell_bias[first + u];
      int i = 0;
      for (; i + 4 * kLanes <= width; i += 4 * kLanes) write_hidden<4>(i, c, o, h, of, bias);
      for (; i < width; i += kLanes) write_hidden<1>(i, c, o, h, of, bias);
      shared.state_at(t + 1).write_row(first + u, h);
    }
  }

  // N vectors of the hidden state, by equation 3 or 8.
  template <int N>
  INLINE void write_hidden(int start, const float* c, const float* o, float* h,
                           const Moments<1>& of, float bias) {
    Vector x[N];
    for (int n = 0; n < N; ++n) x[n] = (load(c + start + n * kLanes) - of.mean) * of.slope + bias;
    tanh(x);
    for (int n = 0; n < N; ++n) {
      const int i = start + n * kLanes;
      store(h + i, where(masks.valid.lanes[i / kLanes], load(o + i) * x[n], load(h + i)));
    }
  }

  // Moves the cell of a unit on, by equation 2, and writes its output gate.
  INLINE void apply_gates(int64_t u, const Moments<4>& r, const Moments<4>& x, float* o) {
    const float* recurrent = terms.get() + kGates * u * width;
    const float* input = a.merged() ? zeros.get() : input_terms.get() + kGates * u * width;
    float* c = cells.get() + u * width;
    const Four bias = gather<4>(a.bias, first + u, a.units);
    for (int i = 0; i < width; i += kLanes) {
      Vector pre[kGates];
      for (int gate = 0; gate < kGates; ++gate)
        pre[gate] = (load(recurrent + gate * width + i) - r.mean[gate]) * r.slope[gate] +
                    (load(input + gate * width + i) - x.mean[gate]) * x.slope[gate] + bias[gate];
      activate(pre);
      const Vector old = load(c + i), now = pre[0] * old + pre[1] * pre[3];
      store(c + i, where(masks.valid.lanes[i / kLanes], now, old));
      store(o + i, pre[2]);
    }
  }
};

// ---- Inference of few sequences.

// Rows are sequences here, and vectors are of units: for one sequence, a row of the batch would be
// all padding. The recurrent kernel is read once a step, from memory in the order of panels.
struct Few {
  Shared& shared;
  const Arguments& a;
  const int64_t first, units, padded;  // hidden units of the thread, and in whole vectors
  Floats kernel_data, input_kernel_data;
  const PanelMatrix kernel, input_kernel;  // [H, 4 padded], [D + 1, 4 padded]
  Floats terms, input_terms;               // [B, 4 padded]
  Floats cells, hidden;                    // [B, padded]
  Floats bias, cell_bias;
  // Of a step: x is normalised to slope * (x - mean).
  struct Normalizer {
    const Term& term;
    const int64_t gates;
    Floats scale, mean, slope;

    Normalizer(const Term& term, int64_t gates, int64_t padded)
        : term(term),
          gates(gates),
          scale(gates * padded),
          mean(gates * padded),
          slope(gates * padded) {}
    INLINE Vector apply(Vector x, int64_t i) const {
      return (x - load(mean.get() + i)) * load(slope.get() + i);
    }
  };
  Normalizer recurrent, input, cell_term;

  static constexpr int kMost = kLanes / 4;  // sequences
  static bool fits(const Arguments& a) {
    const bool any = a.input.normalized || a.recurrent.normalized || a.cell_term.normalized;
    return !a.keep && a.batch <= kMost && (a.given || !any);
  }

  Few(Shared& shared, int thread)
      : shared(shared),
        a(shared.a),
        first(a.units * thread / shared.threads),
        units(a.units * (thread + 1) / shared.threads - first),
        padded(round_up(units)),
        kernel_data(a.units * columns(), false),
        input_kernel_data(a.source == Source::kTerms ? 0 : (a.features + 1) * columns(), false),
        kernel{kernel_data.get(), Panels(columns() / kLanes), static_cast<size_t>(a.units)},
        input_kernel{input_kernel_data.get(), Panels(columns() / kLanes),
                     static_cast<size_t>(a.features + 1)},
        terms(a.batch * columns()),
        input_terms(a.batch * columns()),
        cells(a.batch * padded),
        hidden(a.batch * padded),
        bias(columns()),
        cell_bias(padded),
        recurrent(a.recurrent, kGates, padded),
        input(a.input, kGates, padded),
        cell_term(a.cell_term, 1, padded) {}

  int64_t columns() const { return kGates * padded; }
  // The thread's part of a row of gates, or of one a unit, and of a matrix of such rows.
  void take(float* to, const float* row, int64_t gates = kGates) const {
    for (int64_t gate = 0; gate < gates; ++gate)
      copy(to + gate * padded, row + gate * a.units + first, units);
  }
  void take(const PanelMatrix& to, const float* rows, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) {
      take(terms.get(), rows + k * a.gates());
      to.write_row(k, terms.get());
    }
  }
  float* hidden_at(int64_t t) const { return shared.state.get() + t % 2 * a.batch * a.units; }

  void run() {
    take(kernel, a.kernel, a.units);
    if (a.source != Source::kTerms) {
      take(input_kernel, a.input_kernel, a.features);
      const Vector nan = broadcast(std::numeric_limits<float>::quiet_NaN());
      input_kernel.compute_row(a.features, [&](int) { return nan; });  // of unknown symbols
    }
    take(bias.get(), a.bias);
    take(cell_bias.get(), a.cell_bias, 1);
    for (Normalizer* each : {&recurrent, &input, &cell_term}) {
      take(each->scale.get(), each->term.scale, each->gates);
      std::fill_n(each->slope.get(), each->gates * padded, 1.f);
    }
    for (int64_t b = 0; b < a.batch; ++b) {
      take(cells.get() + b * padded, a.first_cell + b * a.units, 1);
      take(hidden.get() + b * padded, a.first_hidden + b * a.units, 1);
    }
    share(0);
    for (int64_t t = 0; t < a.steps; ++t) {
      shared.barrier.wait(shared.barrier.arrive());
      const LeftMatrix entering = {hidden_at(t), static_cast<size_t>(a.units), false};
      multiply(entering, a.batch, kernel, a.units, terms.get(), columns());
      compute_input_terms(t);
      for (Normalizer* each : {&recurrent, &input, &cell_term}) enter(*each, t);
      for (int64_t b = 0; b < a.batch; ++b) step(t, b);
      share(t + 1);
    }
    for (int64_t b = 0; b < a.batch; ++b)
      copy(a.last_cell + b * a.units + first, cells.get() + b * padded, units);
  }

  void share(int64_t t) const {
    for (int64_t b = 0; b < a.batch; ++b)
      copy(hidden_at(t) + b * a.units + first, hidden.get() + b * padded, units);
  }

  void compute_input_terms(int64_t t) {
    if (a.dense()) {
      const LeftMatrix inputs = {a.inputs + t * a.features,
                                 static_cast<size_t>(a.steps * a.features), false};
      multiply(inputs, a.batch, input_kernel, a.features, input_terms.get(), columns());
      return;
    }
    for (int64_t b = 0; b < a.batch; ++b) {
      float* to = input_terms.get() + b * columns();
      if (a.source == Source::kTerms) {
        take(to, a.inputs + (b * a.steps + t) * a.gates());
        continue;
      }
      const int32_t symbol = a.symbols[t * a.batch + b];
      input_kernel.read_row(symbol < 0 || symbol >= a.features ? a.features : symbol, to);
    }
  }

  void enter(const Normalizer& of, int64_t t) const {
    if (!of.term.normalized) return;
    const int64_t size = of.gates * a.units;
    take(of.mean.get(), of.term.statistics + t * 2 * size, of.gates);
    take(of.slope.get(), of.term.statistics + (t * 2 + 1) * size, of.gates);
    for (int64_t i = 0; i < of.gates * padded; i += kLanes) {
      Vector variance = load(of.slope.get() + i) + of.term.epsilon;
      for (int lane = 0; lane < kLanes; ++lane) variance[lane] = std::sqrt(variance[lane]);
      store(of.slope.get() + i, load(of.scale.get() + i) / variance);
    }
  }

  void step(int64_t t, int64_t b) {
    if (a.flags != nullptr && !(a.flags[t * a.batch + b] & kValid)) return write(t, b);
    const float *r = terms.get() + b * columns(), *x = input_terms.get() + b * columns();
    float *c = cells.get() + b * padded, *h = hidden.get() + b * padded;
    for (int64_t i = 0; i < padded; i += kLanes) {
      Vector gates[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = gate * padded + i;
        gates[gate] = recurrent.apply(load(r + at), at) + input.apply(load(x + at), at) +
                      load(bias.get() + at);
      }
      activate(gates);
      const Vector now = gates[0] * load(c + i) + gates[1] * gates[3];
      Vector squashed[1] = {cell_term.apply(now, i) + load(cell_bias.get() + i)};
      tanh(squashed);
      store(c + i, now);
      store(h + i, gates[2] * squashed[0]);
    }
    write(t, b);
  }
  void write(int64_t t, int64_t b) const {
    copy(a.hidden + (b * a.steps + t) * a.units + first, hidden.get() + b * padded, units);
  }
};

// ---- The backward pass.

// Rows of one unit at a step, and what its gradient needs besides.
struct UnitRows {
  float* recurrent;  // [4], terms
  float* gates;      // [4], activations, then gradients of input terms
  float* d_gates;    // [4], by the pre-activations
  float* d_cell_term;
  const float *cell, *cell_before;
  static constexpr int kRows = 3 * kGates + 1;

  UnitRows(float* rows, int width, const float* cell, const float* cell_before)
      : recurrent(rows),
        gates(rows + kGates * width),
        d_gates(rows + 2 * kGates * width),
        d_cell_term(rows + 3 * kGates * width),
        cell(cell),
        cell_before(cell_before) {}
};

struct UnitMoments {
  Moments<4> recurrent, input;
  Moments<1> cell;
  Correction<4> of_recurrent, of_input;
  Correction<1> of_cell;

  // Gradients by a gate's terms x, from that by its pre-activation.
  INLINE Vector recurrent_backward(int gate, Vector d, Vector x) const {
    return (d - of_recurrent.mean[gate] - (x - recurrent.mean[gate]) * of_recurrent.tilt[gate]) *
           recurrent.slope[gate];
  }
  INLINE Vector input_backward(int gate, Vector d, Vector x) const {
    return (d - of_input.mean[gate] - (x - input.mean[gate]) * of_input.tilt[gate]) *
           input.slope[gate];
  }
};

struct Backward : Own {
  // Steps whose gradients of kernels are one product.
  const int64_t steps_of_product, most_rows, product_stride;
  int64_t collected = 0;  // steps, for the next product
  Floats entering_data, entering_inputs_data;
  const PanelMatrix entering, entering_inputs;  // h and x, [steps of product * B, H or D]
  Floats d_terms, d_input_terms;                // [4U, product_stride]
  Floats d_packed, d_packed_inputs;             // gradients of kernels, transposed
  Floats d_hidden, d_cells;                     // rows of the thread's units
  Floats kept_back;    // likewise: gradients by h of rows of the batch that keep theirs
  Floats cells;        // likewise, of two steps
  Floats scratch;      // UnitRows of kUnits units
  Floats d_inputs;     // rows [4U], of input terms that the caller computed
  Floats packed_transposed, feature_gradients;  // of the features whose gradients it computes
  Floats few_rows;                              // inputs, if they have few features

  Backward(Shared& shared, int thread)
      : Own(shared, thread),
        steps_of_product(product_steps(a)),
        most_rows(steps_of_product * a.batch),
        product_stride(most_rows + kLanes),
        entering_data(most_rows * round_up(a.units)),
        entering_inputs_data(many() ? most_rows * round_up(a.features) : 0),
        entering{entering_data.get(), Panels(round_up(a.units) / kLanes),
                 static_cast<size_t>(most_rows)},
        entering_inputs{entering_inputs_data.get(), Panels(round_up(a.features) / kLanes),
                        static_cast<size_t>(most_rows)},
        d_terms(gates() * product_stride, false),
        d_input_terms(many() && !a.merged() ? gates() * product_stride : 0, false),
        d_packed(gates() * round_up(a.units)),
        d_packed_inputs(gates() * input_width()),
        d_hidden(units * width),
        d_cells(units * width),
        kept_back(units * width),
        cells(2 * units * width),
        scratch(kUnits * UnitRows::kRows * width),
        d_inputs(a.source == Source::kTerms ? gates() * width : 0),
        packed_transposed(features * a.gates(), false),
        feature_gradients(features * width),
        few_rows(few() ? a.features * width : 0) {}

  // As many as make reading and writing the gradient of a large kernel cheap beside its product.
  static int64_t product_steps(const Arguments& a) {
    const int64_t rows = std::clamp<int64_t>(a.units, 256, 1024);
    return std::min(a.steps, (rows + a.batch - 1) / a.batch);
  }
  bool few() const { return a.dense() && a.features < kFewFeatures; }
  bool many() const { return a.dense() && !few(); }
  int64_t input_width() const {
    return a.source == Source::kTerms ? 0 : round_up(a.features + 1);
  }

  void run() {
    pack(packed.get(), units, a.gates(), [&](int64_t row, int64_t k) {
      return a.kernel[(first + row) * a.gates() + column(k)];
    });
    pack(packed_transposed.get(), features, a.gates(), [&](int64_t row, int64_t k) {
      return a.input_kernel[(first_feature + row) * a.gates() + column(k)];
    });
    to_rows(d_cells.get(), a.d_last_cell);
    for (int64_t u = 0; u < units; ++u)
      copy(cells_at(a.steps - 1) + u * width,
           a.cell + ((a.steps - 1) * a.units + first + u) * a.batch, a.batch);
    if (!a.merged()) {
      pack_input_kernel();
      share_inputs(a.steps - 1);
      shared.barrier.wait(shared.barrier.arrive());
    }
    for (int64_t t = a.steps - 1; t >= 0; --t) {
      enter(t);
      to_rows(d_hidden.get(), a.d_hidden, t, a.units, first, units);
      if (t > 0) fetch(a.d_hidden, t - 1);
      pass_back(t);
      if (!a.merged()) compute_input_terms(t);
      if (t == 0) to_rows(cells_at(-1), a.first_cell);
      if (few()) to_rows(few_rows.get(), a.inputs, t, a.features, 0, a.features);
      for (int64_t u = 0; u < units; u += kUnits) step(t, u, std::min(u + kUnits, units));
      if (a.source == Source::kTerms) {
        for (int gate = 0; gate < kGates; ++gate)
          transpose(a.d_inputs + t * a.gates() + gate * a.units + first, a.steps * a.gates(),
                    d_inputs.get() + gate * width, kGates * width, units, a.batch);
      }
      if (!a.merged() && t > 0) share_inputs(t - 1);
      const unsigned turn = shared.barrier.arrive();
      collect(t);
      shared.barrier.wait(turn);
    }
    std::fill_n(d_hidden.get(), units * width, 0.f);
    pass_back(-1);
    for (int64_t i = 0; i < units * width; i += kLanes)
      store(d_hidden.get() + i, load(d_hidden.get() + i) + load(kept_back.get() + i));
    from_rows(a.d_first_hidden, d_hidden.get());
    from_rows(a.d_first_cell, d_cells.get());
    write_kernels();
  }

  // Adds to the gradient by the hidden states of step t what flows from step t + 1 through its
  // recurrent term, and writes the gradient by the inputs of that step.
  void pass_back(int64_t t) {
    if (t + 1 == a.steps) return;
    const size_t gates = a.gates();
    const PanelMatrix d_terms = shared.state_at(t + 1);
    multiply({packed.get(), gates, true}, units, d_terms, gates, d_hidden.get(), width, true);
    if (features == 0) return;
    const PanelMatrix d_input_terms = a.merged() ? d_terms : shared.d_inputs_at(t + 1);
    multiply({packed_transposed.get(), gates, true}, features, d_input_terms, gates,
             feature_gradients.get(), width);
    from_rows(a.d_inputs, feature_gradients.get(), t + 1, a.features, first_feature, features);
  }

  // Fetches the thread's units of a step, which lie in as many places as there are rows of the
  // batch.
  void fetch(const float* array, int64_t t) const {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t u = 0; u < units + 15; u += 16)
        __builtin_prefetch(array + (b * a.steps + t) * a.units + first + u);
  }

  template <int N>
  INLINE Moments<N> moments(const Term& term, int64_t t, int64_t unit) {
    if (!term.normalized) return {};
    const float* statistics = term.statistics + t * 2 * N * a.units;
    return {gather<N>(statistics, unit, a.units),
            gather<N>(statistics + N * a.units, unit, a.units),
            gather<N>(term.scale, unit, a.units), term.epsilon};
  }

  // From the sums over the batch of d and of d * (x - mean). Adds to the gradient by the scale, and
  // writes that by given statistics.
  template <int N>
  INLINE Correction<N> correction(const Term& term, const Moments<N>& of, Each<N> sums,
                                  Each<N> products, float share, int64_t t, int64_t unit) {
    if (!term.normalized) return {};
    const Each<N> d_scale = of.inverse * products;
    add<N>(term.d_scale, unit, d_scale);
    if (!a.given) return {sums * share, of.inverse * d_scale * share};
    float* d_statistics = term.d_statistics + t * 2 * N * a.units;
    scatter<N>(d_statistics, unit, a.units, -of.slope * sums);
    scatter<N>(d_statistics + N * a.units, unit, a.units, -0.5f * of.slope * of.inverse * d_scale);
    return {};
  }
  template <int N>
  INLINE void add(float* to, int64_t unit, Each<N> x) {
    scatter<N>(to, unit, a.units, gather<N>(to, unit, a.units) + x);
  }
  // Rows of the batch whose values the moments of a term depend on.
  const Counted& depended(const Term& term, const Counted& counted) const {
    return term.normalized && !a.given ? counted : masks.all;
  }

  // The gradient of a step of units `start` to `end`.
  void step(int64_t t, int64_t start, int64_t end) {
    UnitMoments of[kUnits];
    for (int64_t u = start; u < end; ++u) {
      const int64_t unit = first + u;
      const UnitRows rows = rows_of(t, u, start);
      for (int gate = 0; gate < kGates; ++gate)
        copy(rows.recurrent + gate * width,
             a.recurrent_term + ((t * a.units + unit) * kGates + gate) * a.batch, a.batch);
      if (t > 0)
        copy(cells_at(t - 1) + u * width, a.cell + ((t - 1) * a.units + unit) * a.batch, a.batch);
      UnitMoments& m = of[u - start];
      m.recurrent = moments<4>(a.recurrent, t, unit);
      m.input = moments<4>(a.input, t, unit);
      m.cell = moments<1>(a.cell_term, t, unit);
    }
    for (int64_t u = start; u < end; ++u) output_backward(t, u, rows_of(t, u, start), of[u - start]);
    for (int64_t u = start; u < end; ++u) gates_backward(t, u, rows_of(t, u, start), of[u - start]);
    for (int64_t u = start; u < end; ++u) terms_backward(t, u, rows_of(t, u, start), of[u - start]);
  }
  UnitRows rows_of(int64_t t, int64_t u, int64_t start) const {
    return {scratch.get() + (u - start) * UnitRows::kRows * width, width,
            cells_at(t) + u * width, cells_at(t - 1) + u * width};
  }
  // The cells of a step, or of that before the first one: two steps are there at a time.
  float* cells_at(int64_t t) const { return cells.get() + (t + 2) % 2 * units * width; }
  const float* input_rows_of(int64_t u) const { return input_terms.get() + kGates * u * width; }

  // Through equation 3 or 8: from the hidden state to the output gate and the normalised cell.
  INLINE void output_backward(int64_t t, int64_t u, UnitRows rows, UnitMoments& of) {
    const int64_t unit = first + u;
    const float* input = input_rows_of(u);
    float *d_h = d_hidden.get() + u * width, *back = kept_back.get() + u * width;
    const Four bias = gather<4>(a.bias, unit, a.units);
    Vector sums[1] = {}, products[1] = {};
    for (int i = 0; i < width; i += kLanes) {
      Vector active[kGates];
      for (int gate = 0; gate < kGates; ++gate)
        active[gate] =
            (load(rows.recurrent + gate * width + i) - of.recurrent.mean[gate]) *
                of.recurrent.slope[gate] +
            (load(input + gate * width + i) - of.input.mean[gate]) * of.input.slope[gate] +
            bias[gate];
      activate(active);
      store(rows.gates + i, active[0]);
      store(rows.gates + width + i, active[1]);
      store(rows.gates + 3 * width + i, active[3]);
      const Vector o = active[2], deviation = load(rows.cell + i) - of.cell.mean;
      Vector cell[1] = {deviation * of.cell.slope + a.cell_bias[unit]};
      tanh(cell);
      const Vector squashed = cell[0];
      const Mask valid = masks.valid.lanes[i / kLanes];
      const Vector gradient = load(d_h + i) + load(back + i), d_now = where(valid, gradient);
      store(back + i, where(~valid, gradient));
      store(rows.d_gates + 2 * width + i, d_now * squashed * o * (1.f - o));
      const Vector d_cell_term = d_now * o * (1.f - squashed * squashed);
      store(rows.d_cell_term + i, d_cell_term);
      sums[0] += d_cell_term;
      products[0] += d_cell_term * deviation;
    }
    const float sum = total_of(sums);
    add<1>(a.d_cell_bias, unit, sum);
    of.of_cell = correction<1>(a.cell_term, of.cell, sum, total_of(products), masks.cell.share, t,
                               unit);
  }

  // Through equation 2 or 7: from the cell to the gates and to the cell before.
  INLINE void gates_backward(int64_t t, int64_t u, UnitRows rows, UnitMoments& of) {
    const int64_t unit = first + u;
    const float* input = input_rows_of(u);
    float* d_c = d_cells.get() + u * width;
    const Counted& counted = depended(a.cell_term, masks.cell);
    Vector sums[kGates] = {}, products[kGates] = {}, input_products[kGates] = {};
    for (int i = 0; i < width; i += kLanes) {
      const Mask valid = masks.valid.lanes[i / kLanes];
      const Vector deviation = load(rows.cell + i) - of.cell.mean;
      const Vector d_through = (load(rows.d_cell_term + i) - of.of_cell.mean -
                                deviation * of.of_cell.tilt) * of.cell.slope;
      const Vector d_now = load(d_c + i) + where(counted.lanes[i / kLanes], d_through);
      const Vector d_valid = where(valid, d_now);
      const Vector f = load(rows.gates + i), in = load(rows.gates + width + i);
      const Vector g = load(rows.gates + 3 * width + i);
      store(d_c + i, where(valid, d_now * f, d_now));
      const Vector d[kGates] = {d_valid * load(rows.cell_before + i) * f * (1.f - f),
                                d_valid * g * in * (1.f - in), load(rows.d_gates + 2 * width + i),
                                d_valid * in * (1.f - g * g)};
      for (int gate = 0; gate < kGates; ++gate) {
        store(rows.d_gates + gate * width + i, d[gate]);
        sums[gate] += d[gate];
        products[gate] +=
            d[gate] * (load(rows.recurrent + gate * width + i) - of.recurrent.mean[gate]);
        input_products[gate] += d[gate] * (load(input + gate * width + i) - of.input.mean[gate]);
      }
    }
    const Four sum = total_of(sums);
    add<4>(a.d_bias, unit, sum);
    of.of_recurrent = correction<4>(a.recurrent, of.recurrent, sum, total_of(products),
                                    masks.recurrent.share, t, unit);
    of.of_input = correction<4>(a.input, of.input, sum, total_of(input_products),
                                masks.input.share, t, unit);
  }

  // Through equation 1 or 6: from the gates to recurrent and input terms.
  INLINE void terms_backward(int64_t t, int64_t u, UnitRows rows, const UnitMoments& of) {
    const Counted& counted = depended(a.recurrent, masks.recurrent);
    const Counted& input_counted = depended(a.input, masks.input);
    const PanelMatrix d_terms_of_step = shared.state_at(t);
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t row = kGates * u + gate;
      const float* d = rows.d_gates + gate * width;
      const float *recurrent = rows.recurrent + gate * width;
      const float* input = input_rows_of(u) + gate * width;
      float *d_input = rows.gates + gate * width, *for_product = product_row(d_terms, row);
      d_terms_of_step.compute_row(kGates * first + row, [&](int i) {
        const Vector d_term = of.recurrent_backward(gate, load(d + i), load(recurrent + i));
        const Vector counts = where(counted.lanes[i / kLanes], d_term);
        store_any(for_product + i, counts);
        if (a.merged()) store(d_input + i, counts);
        return counts;
      });
      for (int i = 0; !a.merged() && i < width; i += kLanes) {
        const Vector d_term = of.input_backward(gate, load(d + i), load(input + i));
        store(d_input + i, where(input_counted.lanes[i / kLanes], d_term));
      }
      input_backward(t, row, d_input);
    }
  }
  // Where the step's gradients of a row of terms are collected. Whole vectors are written: what is
  // past the batch belongs to the next step, or to none.
  float* product_row(const Floats& rows, int64_t row) const {
    return rows.get() + row * product_stride + collected * a.batch;
  }

  // From a row of input terms to inputs and their kernel.
  INLINE void input_backward(int64_t t, int64_t row, const float* d) {
    if (a.source == Source::kTerms) return copy(d_inputs.get() + row * width, d, a.batch);
    float* d_kernel = d_packed_inputs.get() + row * input_width();
    if (a.source == Source::kSymbols) {
      for (int64_t b = 0; b < a.batch; ++b) d_kernel[symbols[b]] += d[b];
      return;
    }
    if (!a.merged()) {
      shared.d_inputs_at(t).write_row(kGates * first + row, d);
      if (many()) copy(product_row(d_input_terms, row), d, a.batch);
    }
    for (int64_t feature = 0; few() && feature < a.features; ++feature) {
      Vector sum = {};
      for (int i = 0; i < width; i += kLanes)
        sum += load(d + i) * load(few_rows.get() + feature * width + i);
      d_kernel[feature] += total(sum);
    }
  }

  // Adds the step to those of the next product for gradients of kernels, which is done when it is
  // due: with many rows, sums need not be read and written at every step.
  void collect(int64_t t) {
    if (t > 0)
      append(entering, a.hidden + (t - 1) * a.units, a.steps * a.units, a.units);
    else
      append(entering, a.first_hidden, a.units, a.units);
    if (many())
      append(entering_inputs, a.inputs + t * a.features, a.steps * a.features, a.features);
    if (++collected < steps_of_product && t > 0) return;
    const size_t stride = product_stride;
    const int64_t rows = collected * a.batch;
    multiply({d_terms.get(), stride, false}, gates(), entering, rows, d_packed.get(),
             round_up(a.units), true);
    if (many())
      multiply({a.merged() ? d_terms.get() : d_input_terms.get(), stride, false}, gates(),
               entering_inputs, rows, d_packed_inputs.get(), input_width(), true);
    collected = 0;
  }
  void append(PanelMatrix to, const float* rows, int64_t stride, int64_t columns) {
    for (int p = 0; p < to.panels.count; ++p) {
      const int64_t start = to.panels.start(p) * kLanes, most = to.panels.size(p) * kLanes;
      float* panel = to.panel(p) + collected * a.batch * most;
      for (int64_t b = 0; b < a.batch; ++b)
        copy(panel + b * most, rows + b * stride + start, std::min(columns - start, most));
    }
  }

  void write_kernels() {
    const int64_t columns = round_up(a.units);
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t column = gate * a.units + first;
      transpose(a.d_kernel + column, a.gates(), d_packed.get() + gate * columns, kGates * columns,
                units, a.units);
      if (a.source == Source::kTerms) continue;
      transpose(a.d_input_kernel + column, a.gates(), d_packed_inputs.get() + gate * input_width(),
                kGates * input_width(), units, a.features);
    }
  }
};

// ---- Calls.

// Threads that the process may use: BNLSTM_NUM_THREADS, or the processors of its affinity; 0 if the
// variable is not a number of threads.
int threads_of_process() {
  if (const char* set = std::getenv("BNLSTM_NUM_THREADS")) {
    char* end;
    const long number = std::strtol(set, &end, 10);
    return *set && !*end && number > 0 && number <= 4096 ? number : 0;
  }
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// As many threads as have enough to do in a step that waiting for each other does not count.
int threads_for(const Arguments& a) {
  constexpr int64_t kLeast = 1 << 15;  // multiplications of a thread in a step
  const int64_t worth = a.gates() * a.units * a.batch / kLeast;
  return std::clamp<int64_t>(std::min(worth, a.units), 1, threads_of_process());
}

template <typename Pass>
ffi::Error run(const Arguments& a, bool backward) {
  if (threads_of_process() == 0)
    return ffi::Error::InvalidArgument("BNLSTM_NUM_THREADS: expected a number of threads, got '" +
                                       std::string(std::getenv("BNLSTM_NUM_THREADS")) + "'");
  std::unique_ptr<Shared> shared;
  std::vector<std::unique_ptr<Pass>> passes;
  try {
    run_in_threads(
        threads_for(a),
        [&](int threads) {
          shared = std::make_unique<Shared>(a, threads, backward);
          for (int i = 0; i < threads; ++i) passes.push_back(std::make_unique<Pass>(*shared, i));
        },
        [&](int thread) { passes[thread]->run(); });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the recurrence needs more memory");
  }
  return ffi::Error::Success();
}

// Takes the buffers of a call in turn, and checks their sizes.
template <typename Buffers>
class Reader {
 public:
  explicit Reader(const Buffers& buffers) : buffers_(buffers) {}

  template <ffi::DataType type = ffi::F32>
  ffi::NativeType<type>* take(int64_t elements) {
    const auto buffer = buffers_.template get<ffi::Buffer<type>>(next_++);
    if (!buffer.has_value() || at(*buffer).element_count() != static_cast<size_t>(elements)) {
      wrong_ = wrong_ ? wrong_ : next_;
      return nullptr;
    }
    return at(*buffer).typed_data();
  }
  // The number of the first buffer that is wrong, or 0.
  size_t wrong() const { return wrong_ ? wrong_ : next_ == buffers_.size() ? 0 : next_ + 1; }

 private:
  template <typename T>
  static T at(T buffer) {
    return buffer;
  }
  template <typename T>
  static T at(ffi::Result<T> buffer) {
    return *buffer;
  }

  const Buffers& buffers_;
  size_t next_ = 0, wrong_ = 0;
};

// The arguments that both passes have. `known` is whether statistics are arguments.
Arguments take_arguments(Reader<ffi::RemainingArgs>& args, ffi::Dictionary options, bool known) {
  const auto number = [&](const char* name) { return options.get<int64_t>(name).value(); };
  const auto flag = [&](const char* name) { return options.get<bool>(name).value(); };
  const auto real = [&](const char* name) { return options.get<float>(name).value(); };
  Arguments a = {};
  a.steps = number("steps");
  a.batch = number("batch");
  a.units = number("units");
  a.features = number("features");
  a.source = static_cast<Source>(number("source"));
  a.given = flag("given");
  a.keep = flag("keep");
  const bool masked = flag("masked");
  const int64_t units = a.units, gates = a.gates(), rows = a.steps * a.batch;
  const bool symbols = a.source == Source::kSymbols, terms = a.source == Source::kTerms;
  a.kernel = args.take(units * gates);
  a.input_kernel = args.take(terms ? 0 : a.features * gates);
  a.bias = args.take(gates);
  a.inputs = args.take(symbols ? 0 : rows * a.features);
  a.symbols = args.take<ffi::S32>(symbols ? rows : 0);
  a.flags = args.take<ffi::U8>(masked ? rows : 0);
  if (!masked) a.flags = nullptr;
  a.input.normalized = flag("normalize_input");
  a.recurrent.normalized = flag("normalize_recurrent");
  a.cell_term.normalized = flag("normalize_cell");
  a.input.epsilon = real("input_epsilon");
  a.recurrent.epsilon = a.cell_term.epsilon = real("epsilon");
  a.input.scale = args.take(gates);
  a.recurrent.scale = args.take(gates);
  a.cell_term.scale = args.take(units);
  a.cell_bias = args.take(units);
  a.first_cell = args.take(a.batch * units);
  a.first_hidden = args.take(a.batch * units);
  const int64_t steps = known ? a.steps : 0;
  a.input.statistics = args.take(a.input.normalized ? steps * 2 * gates : 0);
  a.recurrent.statistics = args.take(a.recurrent.normalized ? steps * 2 * gates : 0);
  a.cell_term.statistics = args.take(a.cell_term.normalized ? steps * 2 * units : 0);
  return a;
}

ffi::Error wrong_size(const char* what, size_t number) {
  return ffi::Error::InvalidArgument(std::string("the recurrence got ") + what + " " +
                                     std::to_string(number) + " of another size or type");
}

ffi::Error forward(ffi::RemainingArgs all_args, ffi::RemainingRets all_results,
                   ffi::Dictionary options) {
  Reader<ffi::RemainingArgs> args(all_args);
  Reader<ffi::RemainingRets> results(all_results);
  Arguments a = take_arguments(args, options, options.get<bool>("given").value());
  const int64_t states = a.batch * a.units, kept = a.keep ? a.steps : 0;
  a.hidden = results.take(a.steps * states);
  a.last_cell = results.take(states);
  a.cell = results.take(kept * states);
  a.recurrent_term = results.take(kept * states * kGates);
  for (Term* term : {&a.input, &a.recurrent, &a.cell_term}) {
    const bool found = term->normalized && !a.given;
    const int64_t size = term == &a.cell_term ? a.units : a.gates();
    float* statistics = results.take(found ? a.steps * 2 * size : 0);
    if (found) term->statistics = statistics;
  }
  if (args.wrong()) return wrong_size("argument", args.wrong());
  if (results.wrong()) return wrong_size("result", results.wrong());
  advise_huge_pages(a.hidden, 4 * a.steps * states);
  advise_huge_pages(a.cell, 4 * kept * states);
  advise_huge_pages(a.recurrent_term, 4 * kept * states * kGates);
  return Few::fits(a) ? run<Few>(a, false) : run<Forward>(a, false);
}

ffi::Error backward(ffi::RemainingArgs all_args, ffi::RemainingRets all_results,
                   ffi::Dictionary options) {
  Reader<ffi::RemainingArgs> args(all_args);
  Reader<ffi::RemainingRets> results(all_results);
  Arguments a = take_arguments(args, options, true);
  const int64_t units = a.units, gates = a.gates(), states = a.batch * units;
  const bool symbols = a.source == Source::kSymbols, terms = a.source == Source::kTerms;
  a.hidden = args.take(a.steps * states);
  a.cell = args.take(a.steps * states);
  a.recurrent_term = args.take(a.steps * states * kGates);
  a.d_hidden = args.take(a.steps * states);
  a.d_last_cell = args.take(states);
  a.d_kernel = results.take(units * gates);
  a.d_input_kernel = results.take(terms ? 0 : a.features * gates);
  a.d_bias = results.take(gates);
  a.d_inputs = results.take(symbols ? 0 : a.steps * a.batch * a.features);
  a.input.d_scale = results.take(gates);
  a.recurrent.d_scale = results.take(gates);
  a.cell_term.d_scale = results.take(units);
  a.d_cell_bias = results.take(units);
  a.d_first_cell = results.take(states);
  a.d_first_hidden = results.take(states);
  for (Term* term : {&a.input, &a.recurrent, &a.cell_term}) {
    const int64_t size = term == &a.cell_term ? units : gates;
    term->d_statistics = results.take(term->normalized && a.given ? a.steps * 2 * size : 0);
  }
  if (args.wrong()) return wrong_size("argument", args.wrong());
  if (results.wrong()) return wrong_size("result", results.wrong());
  std::fill_n(a.input.d_scale, gates, 0.f);
  std::fill_n(a.recurrent.d_scale, gates, 0.f);
  std::fill_n(a.cell_term.d_scale, units, 0.f);
  std::fill_n(a.d_cell_bias, units, 0.f);
  std::fill_n(a.d_bias, gates, 0.f);
  return run<Backward>(a, true);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BnlstmCpuForward, forward,
                              ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(BnlstmCpuBackward, backward,
                              ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

// The instruction set that the library is compiled for.
extern "C" const char* BnlstmInstructionSet() { return kInstructionSet; }

// Floating-point operations a second of as many threads as a call may have: of multiplications and
// additions that wait for nothing, half a second of them.
extern "C" double BnlstmPeak() {
  constexpr int kSums = 12;
  constexpr int64_t kRounds = 1 << 16;
  std::vector<double> rates(std::max(1, threads_of_process()));
  run_in_threads(
      rates.size(), [&](int threads) { rates.resize(threads); },
      [&](int thread) {
        Vector sums[kSums] = {}, x = broadcast(0.5f);
        int64_t rounds = 0;
        const auto start = std::chrono::steady_clock::now();
        std::chrono::duration<double> taken{};
        for (; taken.count() < 0.5; rounds += kRounds) {
          for (int64_t i = 0; i < kRounds; ++i) {
            UNROLL for (int n = 0; n < kSums; ++n) sums[n] = sums[n] * x + x;
          }
          taken = std::chrono::steady_clock::now() - start;
        }
        for (int n = 1; n < kSums; ++n) sums[0] += sums[n];
        volatile float used = total(sums[0]);
        (void)used;
        rates[thread] = 2. * kSums * kLanes * rounds / taken.count();
      });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}
