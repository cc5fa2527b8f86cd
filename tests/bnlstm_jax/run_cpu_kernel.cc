// Runs the CPU kernel's passes on small random problems. Compile it with a sanitizer.

#include <cstdio>
#include <deque>

#include "cpu_kernel/recurrence.cc"

namespace {

// The arrays of a problem, each of its exact size: the sanitizer finds any access past its end.
class Arrays {
 public:
  float* make(int64_t size) {
    arrays_.emplace_back(size);
    for (float& x : arrays_.back()) x = (random() % 2001 - 1000) / 5000.f;
    return arrays_.back().data();
  }
  int random() { return (state_ = state_ * 1664525u + 1013904223u) >> 8; }

 private:
  std::deque<std::vector<float>> arrays_;
  unsigned state_ = 1;
};

struct Size {
  int64_t steps, batch, units, features;
  Source source;
};

bool run_passes(const Size& size, bool normalized, bool given) {
  Arrays arrays;
  Arguments a = {};
  a.steps = size.steps;
  a.batch = size.batch;
  a.units = size.units;
  a.source = size.source;
  a.features = size.source == Source::kTerms ? a.gates() : size.features;
  a.given = given;
  const int64_t rows = a.steps * a.batch, states = a.batch * a.units;
  const int64_t inputs = size.source == Source::kSymbols ? 0 : rows * a.features;
  const int64_t kernel = size.source == Source::kTerms ? 0 : a.features * a.gates();
  std::vector<int32_t> symbols(rows);
  std::vector<uint8_t> flags(rows);
  for (int64_t i = 0; i < rows; ++i) {
    symbols[i] = arrays.random() % (a.features + 1);  // the last is unknown
    flags[i] = arrays.random() % 4 ? kValid | kInRecurrent | kInCell | kInInput : kInCell;
  }
  a.symbols = symbols.data();
  a.flags = flags.data();
  a.kernel = arrays.make(a.units * a.gates());
  a.input_kernel = arrays.make(kernel);
  a.bias = arrays.make(a.gates());
  a.cell_bias = arrays.make(a.units);
  a.inputs = arrays.make(inputs);
  a.first_cell = arrays.make(states);
  a.first_hidden = arrays.make(states);
  for (Term* term : {&a.input, &a.recurrent, &a.cell_term}) {
    const int64_t features = term == &a.cell_term ? a.units : a.gates();
    term->normalized = normalized;
    term->epsilon = 1;
    term->scale = arrays.make(features);
    term->statistics = arrays.make(2 * a.steps * features);
    term->d_scale = arrays.make(features);
    term->d_statistics = arrays.make(given ? 2 * a.steps * features : 0);
  }
  a.hidden = arrays.make(rows * a.units);
  a.last_cell = arrays.make(states);
  a.cell = arrays.make(rows * a.units);
  a.recurrent_term = arrays.make(rows * a.gates());
  a.d_hidden = arrays.make(rows * a.units);
  a.d_last_cell = arrays.make(states);
  a.d_kernel = arrays.make(a.units * a.gates());
  a.d_input_kernel = arrays.make(kernel);
  a.d_bias = arrays.make(a.gates());
  a.d_cell_bias = arrays.make(a.units);
  a.d_inputs = arrays.make(inputs);
  a.d_first_cell = arrays.make(states);
  a.d_first_hidden = arrays.make(states);
  bool done = true;
  for (bool keep : {false, true}) {
    a.keep = keep;
    if (FewSequences::fits(a)) done = done && run<FewSequences>(a, false).success();
    done = done && run<Forward>(a, false).success();
  }
  return done && run<Backward>(a, true).success();
}

}  // namespace

int main() {
  const Size sizes[] = {
      {5, 37, 101, 3, Source::kInputs},   {5, 21, 67, 29, Source::kInputs},
      {4, 40, 99, 7, Source::kSymbols},   {4, 33, 70, 0, Source::kTerms},
      {9, 3, 190, 5, Source::kInputs},    {9, 1, 260, 11, Source::kSymbols},
      {3, 2, 150, 0, Source::kTerms},
  };
  for (const Size& size : sizes)
    for (bool normalized : {false, true})
      for (bool given : {false, true})
        if (!run_passes(size, normalized, given)) return 1;
  std::puts("done");
}
