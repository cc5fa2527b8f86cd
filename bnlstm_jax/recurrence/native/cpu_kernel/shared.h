// The state of a call: `Shared`, common to all threads, and `Own`, of one thread. The forward and
// the backward pass derive from `Own`.

#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "arguments.h"
#include "memory.h"
#include "products.h"
#include "statistics.h"
#include "threads.h"
#include "vectors.h"

namespace {

struct Shared {
  const Arguments& a;
  const int threads;
  const int width;  // elements of a row: the batch, padded to whole vectors
  const Panels panels;
  Barrier barrier;
  // Double buffers, whose halves alternate between time steps, and their numbers of rows. `state`:
  // hidden states (backward: gradients of recurrent terms). `d_inputs`: gradients of input terms.
  const int64_t rows, input_count, d_input_count;
  Floats state, inputs, d_inputs;

  Shared(const Arguments& a, int threads, bool backward)
      : a(a),
        threads(threads),
        width(round_up(a.batch)),
        panels(width / kLanes),
        barrier(threads),
        rows(backward ? a.gates() : a.units),
        input_count(a.dense() ? a.features : 0),
        d_input_count(backward && a.dense() && !a.merged() ? a.gates() : 0),
        state(2 * rows * width),
        inputs(2 * input_count * width),
        d_inputs(2 * d_input_count * width) {}

  PanelMatrix buffer(const Floats& floats, int64_t rows, int64_t turn) const {
    return {floats.get() + turn % 2 * rows * width, panels, static_cast<size_t>(rows)};
  }
  PanelMatrix state_at(int64_t t) const { return buffer(state, rows, t); }
  PanelMatrix inputs_at(int64_t t) const { return buffer(inputs, input_count, t); }
  PanelMatrix d_inputs_at(int64_t t) const { return buffer(d_inputs, d_input_count, t); }
};

struct Own {
  Shared& shared;
  const Arguments& a;
  const int width;
  const int64_t first, units;             // the thread's hidden units
  const int64_t first_feature, features;  // the thread's share of the input features
  Masks masks;
  std::vector<int32_t> symbols;  // of a time step; unknown ones select the column of NaN
  Floats packed, packed_inputs;  // the thread's part of the recurrent and the input kernel
  Floats input_terms;            // [4U] rows; in the backward pass, zeros if merged()
  Floats input_rows;

  Own(Shared& shared, int thread)
      : shared(shared),
        a(shared.a),
        width(shared.width),
        first(a.units * thread / shared.threads),
        units(a.units * (thread + 1) / shared.threads - first),
        first_feature(shared.input_count * thread / shared.threads),
        features(shared.input_count * (thread + 1) / shared.threads - first_feature),
        masks(width / kLanes, a.batch),
        symbols(a.batch),
        packed(own_gates() * a.units, false),
        packed_inputs(own_gates() * input_columns(), false),
        input_terms(own_gates() * width),
        input_rows(features * width) {}

  int64_t own_gates() const { return kGates * units; }
  // Columns of the transposed input kernel. For symbols, one more holds NaN, for unknown symbols.
  int64_t input_columns() const {
    if (a.source == Source::kTerms) return 0;
    return a.dense() ? a.features : round_up(a.features + 1);
  }
  // Maps a row of the terms of all units to its column of a kernel: 4u + g to gH + u.
  int64_t column(int64_t row) const { return row % kGates * a.units + row / kGates; }

  void pack_input_kernel() {
    const auto element = [&](int64_t row, int64_t k) {
      return a.input_kernel[k * a.gates() + column(kGates * first + row)];
    };
    if (a.dense()) pack(packed_inputs.get(), own_gates(), a.features, element);
    if (a.source != Source::kSymbols) return;
    for (int64_t row = 0; row < own_gates(); ++row) {
      float* to = packed_inputs.get() + row * input_columns();
      for (int64_t k = 0; k < a.features; ++k) to[k] = element(row, k);
      to[a.features] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  // Transposes some features at time step t of an array [T, B, size] to rows, and back.
  void to_rows(float* rows, const float* array, int64_t t, int64_t size, int64_t first,
               int64_t features) const {
    transpose(rows, width, array + t * size + first, a.steps * size, a.batch, features);
  }
  void from_rows(float* array, const float* rows, int64_t t, int64_t size, int64_t first,
                 int64_t features) const {
    transpose(array + t * size + first, a.steps * size, rows, width, features, a.batch);
  }
  // Transposes the thread's units of a state [B, H] to rows, and back.
  void to_rows(float* rows, const float* state) const {
    transpose(rows, width, state + first, a.units, a.batch, units);
  }
  void from_rows(float* state, const float* rows) const {
    transpose(state + first, a.units, rows, width, units, a.batch);
  }

  // Transposes the thread's share of a time step's inputs to rows of the shared buffer.
  void share_inputs(int64_t t) {
    if (features == 0) return;
    to_rows(input_rows.get(), a.inputs, t, a.features, first_feature, features);
    const PanelMatrix inputs = shared.inputs_at(t);
    for (int64_t d = 0; d < features; ++d)
      inputs.write_row(first_feature + d, input_rows.get() + d * width);
  }

  // Sets the masks and the symbols of a time step.
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
      multiply(kernel, own_gates(), shared.inputs_at(t), a.features, input_terms.get(), width);
    } else if (a.source == Source::kSymbols) {
      for (int64_t row = 0; row < own_gates(); ++row) {
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

// A stage of a time step runs for kUnits units before the next stage. The work for the other units
// hides the latency of a unit's sum over the batch, which its next stage needs.
constexpr int kUnits = 4;

}  // namespace
