// The recurrence of an LSTM over all time steps on a CPU, forward and backward, with batch
// normalization of its terms: equations 1 to 3, or 6 to 8, of "Recurrent Batch Normalization". The
// caller, cpu.py, documents the arguments.
//
// Each thread owns some hidden units, for the whole batch and all time steps, so that moments are
// sums within one thread. It packs its part of the recurrent kernel once. Threads exchange the
// hidden state (backward: the gradient of the recurrent term) once per time step, with one barrier.
// One thread computes each number, in an order that does not depend on the number of threads.
//
// Arrays [T, B, F] of the caller have the batch as their first axis in memory. Within a call,
// matrices are [feature, batch]: a row is one feature, or unit, of the whole batch, padded with
// zeros to whole vectors. The four gates of a unit are adjacent rows: row 4u + g is column gH + u
// of a kernel. Gradients are named d_*.
//
// The headers are parts of this one source: arguments.h; vectors.h, products.h, threads.h,
// memory.h; statistics.h, shared.h; forward.h, backward.h, few_sequences.h.

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "backward.h"
#include "few_sequences.h"
#include "forward.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A container's CPU quota in processors, rounded up, from the files of cgroups v2 or v1 in a
// folder; 0 if there is no quota.
int processors_of_quota(const std::string& folder) {
  double time = 0, period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> time >> period)) {  // "max 100000": no quota
    std::ifstream(folder + "/cpu/cpu.cfs_quota_us") >> time;
    std::ifstream(folder + "/cpu/cpu.cfs_period_us") >> period;
  }
  return time > 0 && period > 0 ? std::ceil(time / period) : 0;
}

// The number of processors that the process may use, by its affinity and its container's quota.
int processors_of_process() {
  int processors = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) processors = CPU_COUNT(&allowed);
  static const int quota = processors_of_quota("/sys/fs/cgroup");
  if (quota > 0) processors = std::min(processors, quota);
#endif
  return processors;
}

// The largest number of threads of a call: BNLSTM_NUM_THREADS, or one per processor; 0 if the
// variable is not a number from 1 to 4096.
int threads_of_process() {
  if (const char* set = std::getenv("BNLSTM_NUM_THREADS")) {
    char* end;
    const long number = std::strtol(set, &end, 10);
    return *set && !*end && number > 0 && number <= 4096 ? number : 0;
  }
  return processors_of_process();
}

// The number of threads: each has enough work in a time step to outweigh the wait at the barrier.
int threads_for(const Arguments& a, int most) {
  constexpr int64_t kLeast = 1 << 15;  // multiplications per thread and time step
  const int64_t worth = a.gates() * a.units * a.batch / kLeast;
  return std::clamp<int64_t>(std::min(worth, a.units), 1, most);
}

template <typename Pass>
ffi::Error run(const Arguments& a, bool backward) {
  const int most = threads_of_process();
  if (most == 0)
    return ffi::Error::InvalidArgument("BNLSTM_NUM_THREADS: expected 1 to 4096 threads, got '" +
                                       std::string(std::getenv("BNLSTM_NUM_THREADS")) + "'");
  std::unique_ptr<Shared> shared;
  std::vector<std::unique_ptr<Pass>> passes;
  try {
    run_in_threads(
        threads_for(a, most),
        [&](int threads) {
          shared = std::make_unique<Shared>(a, threads, backward);
          for (int i = 0; i < threads; ++i) passes.push_back(std::make_unique<Pass>(*shared, i));
        },
        [&](int thread) { passes[thread]->run(); });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the CPU kernel is out of memory");
  }
  return ffi::Error::Success();
}

// Takes the buffers of a call one after the other, and checks their types and sizes.
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
  // The number, from 1, of the first buffer that is wrong or not expected; 0 if there is none.
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

// Takes the arguments of both passes. `known`: the statistics are among them.
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
  return ffi::Error::InvalidArgument(std::string("the CPU kernel got ") + what + " " +
                                     std::to_string(number) + " of an unexpected size or type");
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
  return FewSequences::fits(a) ? run<FewSequences>(a, false) : run<Forward>(a, false);
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

// The most threads of a call; see `threads_of_process`.
extern "C" int BnlstmThreads() { return threads_of_process(); }

// Exported for a test.
extern "C" int BnlstmProcessorsOfQuota(const char* folder) { return processors_of_quota(folder); }

// Floating-point operations per second of as many threads as a call may have, measured with
// independent multiply-adds for half a second.
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
