// Inference with few sequences, such as one text.

#pragma once

#include <cmath>
#include <cstring>

#include "shared.h"

namespace {

// Here a row is one sequence, and vectors run over hidden units. Vectors over the batch would be
// mostly padding. Each time step reads the recurrent kernel once, in the order of its panels.
struct FewSequences {
  Shared& shared;
  const Arguments& a;
  const int64_t first, units, padded;  // the thread's hidden units; padded to whole vectors
  Floats kernel_data, input_kernel_data;
  const PanelMatrix kernel, input_kernel;  // [H, 4 padded], [D + 1, 4 padded]
  Floats terms, input_terms;               // [B, 4 padded]
  Floats cells, hidden;                    // [B, padded]
  Floats bias, cell_bias;
  // Normalises a term of a time step to slope * (x - mean).
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

  static constexpr int kMost = kLanes / 4;  // the most sequences
  static bool fits(const Arguments& a) {
    const bool any = a.input.normalized || a.recurrent.normalized || a.cell_term.normalized;
    return !a.keep && a.batch <= kMost && (a.given || !any);
  }

  FewSequences(Shared& shared, int thread)
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
  // Copies the thread's units from a row [gates * H], or from each row of a matrix [count, 4H].
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
      input_kernel.compute_row(a.features, [&](int) { return nan; });  // for unknown symbols
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

  // Whether the statistics equal the previous time step's. In long texts most time steps have the
  // same statistics, which are then prepared once.
  bool known_from_before(const Normalizer& of, int64_t t) const {
    const int64_t size = of.gates * a.units;
    const float* now = of.term.statistics + t * 2 * size + first;
    bool same = t > 0;
    for (int64_t row = 0; same && row < 2 * of.gates; ++row)
      same = !std::memcmp(now + row * a.units, now + row * a.units - 2 * size, 4 * units);
    return same;
  }

  void enter(const Normalizer& of, int64_t t) const {
    if (!of.term.normalized || known_from_before(of, t)) return;
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

}  // namespace
