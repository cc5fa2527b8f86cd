// The forward pass.

#pragma once

#include "shared.h"

namespace {

struct Forward : Own {
  const int thread;
  Floats terms, cells, hidden;  // rows of the thread's units
  Floats output_gates, zeros;   // [kUnits] rows; [4] rows, in place of input terms if merged()

  Forward(Shared& shared, int thread)
      : Own(shared, thread),
        thread(thread),
        terms(own_gates() * width),
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
    pack(packed.get(), own_gates(), a.units, [&](int64_t row, int64_t k) {
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
      multiply(kernel, own_gates(), shared.state_at(t), a.units, terms.get(), width);
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
    if (!term.normalized || a.given) return known_moments<N>(term, t, unit, a.units);
    float* statistics = term.statistics + t * 2 * N * a.units;
    Each<N> mean, variance;
    batch_moments<N>(x, width, counted, mean, variance);
    scatter<N>(statistics, unit, a.units, mean);
    scatter<N>(statistics + N * a.units, unit, a.units, variance);
    return {mean, variance, gather<N>(term.scale, unit, a.units), term.epsilon};
  }

  // One time step of the units from `start` to `end` - 1.
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

  // Writes N vectors of the hidden state: equation 3 or 8.
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

  // Updates the cell of a unit, and writes its output gate: equations 1 and 2, or 6 and 7.
  INLINE void apply_gates(int64_t u, const Moments<4>& r, const Moments<4>& x, float* o) {
    const float* recurrent = terms.get() + kGates * u * width;
    const float* input = a.merged() ? zeros.get() : input_terms.get() + kGates * u * width;
    float* c = cells.get() + u * width;
    const Four bias = gather<4>(a.bias, first + u, a.units);
    for (int i = 0; i < width; i += kLanes) {
      Vector pre[kGates];
      for (int gate = 0; gate < kGates; ++gate)
        pre[gate] = pre_activation(gate, r, load(recurrent + gate * width + i), x,
                                   load(input + gate * width + i), bias);
      activate(pre);
      const Vector old = load(c + i), now = pre[0] * old + pre[1] * pre[3];
      store(c + i, where(masks.valid.lanes[i / kLanes], now, old));
      store(o + i, pre[2]);
    }
  }
};

}  // namespace
