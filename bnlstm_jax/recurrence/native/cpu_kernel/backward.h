// The backward pass.

#pragma once

#include "shared.h"

namespace {

// Pointers to the rows of one hidden unit at one time step.
struct UnitRows {
  float* recurrent;  // [4], recurrent terms
  float* gates;      // [4], activations, then gradients of input terms
  float* d_gates;    // [4], gradients of pre-activations
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
};

struct Backward : Own {
  // A single product computes the gradients of kernels for steps_of_product time steps.
  const int64_t steps_of_product, most_rows, product_stride;
  int64_t collected = 0;  // time steps so far for the next product
  Floats entering_data, entering_inputs_data;
  const PanelMatrix entering, entering_inputs;  // previous h, and x: [most_rows, H or D]
  Floats d_terms, d_input_terms;                // [4U, product_stride]
  Floats d_packed, d_packed_inputs;             // gradients of kernels, transposed
  Floats d_hidden, d_cells;                     // rows of the thread's units
  Floats kept_back;    // likewise: gradients that skip the step, where sequences keep their h
  Floats cells;        // likewise, of two time steps
  Floats scratch;      // UnitRows of kUnits units
  Floats d_inputs;     // [4U] rows, gradients of input terms that the caller computed
  Floats packed_transposed, feature_gradients;  // of the thread's share of the input features
  Floats feature_rows;                          // inputs, if they have few features

  Backward(Shared& shared, int thread)
      : Own(shared, thread),
        steps_of_product(product_steps(a)),
        most_rows(steps_of_product * a.batch),
        product_stride(most_rows + kLanes),
        entering_data(most_rows * round_up(a.units), false),
        entering_inputs_data(many_features() ? most_rows * round_up(a.features) : 0, false),
        entering{entering_data.get(), Panels(round_up(a.units) / kLanes),
                 static_cast<size_t>(most_rows)},
        entering_inputs{entering_inputs_data.get(), Panels(round_up(a.features) / kLanes),
                        static_cast<size_t>(most_rows)},
        d_terms(own_gates() * product_stride, false),
        d_input_terms(many_features() && !a.merged() ? own_gates() * product_stride : 0, false),
        d_packed(own_gates() * round_up(a.units), false),
        d_packed_inputs(own_gates() * input_width(), false),
        d_hidden(units * width),
        d_cells(units * width),
        kept_back(units * width),
        cells(2 * units * width),
        scratch(kUnits * UnitRows::kRows * width),
        d_inputs(a.source == Source::kTerms ? own_gates() * width : 0),
        packed_transposed(features * a.gates(), false),
        feature_gradients(features * width),
        feature_rows(few_features() ? a.features * width : 0) {}

  // Enough time steps that the product takes much longer than reading and writing a large d_packed.
  static int64_t product_steps(const Arguments& a) {
    const int64_t rows = std::clamp<int64_t>(a.units, 256, 1024);
    return std::min(a.steps, (rows + a.batch - 1) / a.batch);
  }
  bool few_features() const { return a.dense() && a.features < kFewFeatures; }
  bool many_features() const { return a.dense() && !few_features(); }
  int64_t input_width() const {
    return a.source == Source::kTerms ? 0 : round_up(a.features + 1);
  }

  void run() {
    // Here all threads do this at once; the constructors run one after the other.
    std::fill_n(d_packed.get(), own_gates() * round_up(a.units), 0.f);
    std::fill_n(d_packed_inputs.get(), own_gates() * input_width(), 0.f);
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
      if (few_features()) to_rows(feature_rows.get(), a.inputs, t, a.features, 0, a.features);
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

  // Adds the gradient that flows back through the recurrent term of step t + 1 to the gradient of
  // the hidden states of step t. Also writes the gradient of the inputs of step t + 1.
  void pass_back(int64_t t) {
    if (t + 1 == a.steps) return;
    const size_t all_gates = a.gates();
    const PanelMatrix d_terms = shared.state_at(t + 1);
    multiply({packed.get(), all_gates, true}, units, d_terms, all_gates, d_hidden.get(), width,
             true);
    if (features == 0) return;
    const PanelMatrix d_input_terms = a.merged() ? d_terms : shared.d_inputs_at(t + 1);
    multiply({packed_transposed.get(), all_gates, true}, features, d_input_terms, all_gates,
             feature_gradients.get(), width);
    from_rows(a.d_inputs, feature_gradients.get(), t + 1, a.features, first_feature, features);
  }

  // Prefetches the thread's units at a time step, which are contiguous only within a sequence.
  void fetch(const float* array, int64_t t) const {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t u = 0; u < units + 15; u += 16)
        __builtin_prefetch(array + (b * a.steps + t) * a.units + first + u);
  }

  // Computes a correction from the sums over the batch of d and of d * (x - mean). Also adds to the
  // gradient of the scale, and writes the gradient of given statistics.
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
  // The sequences that get a gradient of a term: those that count in its batch moments, or all if
  // it has none.
  const Counted& depended(const Term& term, const Counted& counted) const {
    return term.normalized && !a.given ? counted : masks.all;
  }

  // The backward pass of one time step, for the units from `start` to `end` - 1.
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
      m.recurrent = known_moments<4>(a.recurrent, t, unit, a.units);
      m.input = known_moments<4>(a.input, t, unit, a.units);
      m.cell = known_moments<1>(a.cell_term, t, unit, a.units);
    }
    for (int64_t u = start; u < end; ++u)
      output_backward(t, u, rows_of(t, u, start), of[u - start]);
    for (int64_t u = start; u < end; ++u) gates_backward(t, u, rows_of(t, u, start), of[u - start]);
    for (int64_t u = start; u < end; ++u) terms_backward(t, u, rows_of(t, u, start), of[u - start]);
  }
  UnitRows rows_of(int64_t t, int64_t u, int64_t start) const {
    return {scratch.get() + (u - start) * UnitRows::kRows * width, width,
            cells_at(t) + u * width, cells_at(t - 1) + u * width};
  }
  // The cells of step t; t = -1 is the initial state. The buffer holds two consecutive steps.
  float* cells_at(int64_t t) const { return cells.get() + (t + 2) % 2 * units * width; }
  const float* input_rows_of(int64_t u) const { return input_terms.get() + kGates * u * width; }

  // Back through equation 3 or 8: from the hidden state to the output gate and the normalised cell.
  // Recomputes the activations first.
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
            pre_activation(gate, of.recurrent, load(rows.recurrent + gate * width + i), of.input,
                           load(input + gate * width + i), bias);
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

  // Back through equation 2 or 7: from the cell to the gates and the previous cell.
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

  // Back through equation 1 or 6: from the gates to the recurrent and input terms.
  INLINE void terms_backward(int64_t t, int64_t u, UnitRows rows, const UnitMoments& of) {
    const Counted& counted = depended(a.recurrent, masks.recurrent);
    const Counted& input_counted = depended(a.input, masks.input);
    const PanelMatrix d_terms_of_step = shared.state_at(t);
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t row = kGates * u + gate;
      const float* d = rows.d_gates + gate * width;
      // Without moments of the batch, the correction is zero, and `d` stands in for x: zero times
      // an infinite x would be NaN.
      const float* recurrent = by_batch(a.recurrent) ? rows.recurrent + gate * width : d;
      const float* input = by_batch(a.input) ? input_rows_of(u) + gate * width : d;
      float *d_input = rows.gates + gate * width, *for_product = product_row(d_terms, row);
      d_terms_of_step.compute_row(kGates * first + row, [&](int i) {
        const Vector d_term =
            term_backward(gate, load(d + i), load(recurrent + i), of.recurrent, of.of_recurrent);
        const Vector counts = where(counted.lanes[i / kLanes], d_term);
        store_any(for_product + i, counts);
        if (a.merged()) store(d_input + i, counts);
        return counts;
      });
      for (int i = 0; !a.merged() && i < width; i += kLanes) {
        const Vector d_term =
            term_backward(gate, load(d + i), load(input + i), of.input, of.of_input);
        store(d_input + i, where(input_counted.lanes[i / kLanes], d_term));
      }
      input_backward(t, row, d_input);
    }
  }
  bool by_batch(const Term& term) const { return term.normalized && !a.given; }
  // The place in the next product for this time step's gradients of a row of terms. Writes are
  // whole vectors: the next step overwrites elements past the batch; after the last step nothing
  // reads them.
  float* product_row(const Floats& rows, int64_t row) const {
    return rows.get() + row * product_stride + collected * a.batch;
  }

  // Back from a row of input terms to the inputs and the input kernel.
  INLINE void input_backward(int64_t t, int64_t row, const float* d) {
    if (a.source == Source::kTerms) return copy(d_inputs.get() + row * width, d, a.batch);
    float* d_kernel = d_packed_inputs.get() + row * input_width();
    if (a.source == Source::kSymbols) {
      for (int64_t b = 0; b < a.batch; ++b) d_kernel[symbols[b]] += d[b];
      return;
    }
    if (!a.merged()) {
      shared.d_inputs_at(t).write_row(kGates * first + row, d);
      if (many_features()) copy(product_row(d_input_terms, row), d, a.batch);
    }
    for (int64_t feature = 0; few_features() && feature < a.features; ++feature) {
      Vector sum = {};
      for (int i = 0; i < width; i += kLanes)
        sum += load(d + i) * load(feature_rows.get() + feature * width + i);
      d_kernel[feature] += total(sum);
    }
  }

  // Collects a time step for the next product, and computes the product if it has all its steps. A
  // product for several steps reads and writes the gradients of kernels only once.
  void collect(int64_t t) {
    if (t > 0)
      append(entering, a.hidden + (t - 1) * a.units, a.steps * a.units, a.units);
    else
      append(entering, a.first_hidden, a.units, a.units);
    if (many_features())
      append(entering_inputs, a.inputs + t * a.features, a.steps * a.features, a.features);
    if (++collected < steps_of_product && t > 0) return;
    const size_t stride = product_stride;
    const int64_t rows = collected * a.batch;
    multiply({d_terms.get(), stride, false}, own_gates(), entering, rows, d_packed.get(),
             round_up(a.units), true);
    if (many_features())
      multiply({a.merged() ? d_terms.get() : d_input_terms.get(), stride, false}, own_gates(),
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

}  // namespace
