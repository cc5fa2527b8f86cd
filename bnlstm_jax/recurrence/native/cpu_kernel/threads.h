// Runs a function in several threads; a barrier for them.

#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() asm volatile("yield")
#else
#define PAUSE()
#endif

namespace {

// Spins for about as long as waking a thread takes, then yields the processor, then sleeps. If
// threads slept earlier, one that wakes late would make the others sleep too, at every time step.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  // Registers this thread's arrival, and returns the turn to pass to `wait`.
  unsigned arrive() {
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        turn_.store(turn + 1, std::memory_order_release);
      }
      next_turn_.notify_all();
    }
    return turn;
  }

  void wait(unsigned turn) {
    for (int i = 0; i < kSpins + kYields; ++i) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      if (i < kSpins)
        PAUSE();
      else
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    next_turn_.wait(lock, [&] { return turn_.load(std::memory_order_acquire) != turn; });
  }

 private:
  static constexpr int kSpins = 2000, kYields = 500;  // about 50 and 200 microseconds
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
  std::mutex mutex_;
  std::condition_variable next_turn_;
};

// Starts at most `most` threads, this one included, and fewer if the system refuses more. Calls
// `prepare` with their number, then `work(thread)` in each. Rethrows exceptions of `prepare`. The
// threads end with the call, so that a later fork() meets none of them.
inline void run_in_threads(int most, const std::function<void(int)>& prepare,
                           const std::function<void(int)>& work) {
  std::mutex mutex;
  std::condition_variable started;
  bool ready = false, run = false;
  std::vector<std::thread> others;
  others.reserve(most);
  auto release = [&](bool go) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ready = true;
      run = go;
    }
    started.notify_all();
  };
  try {
    for (int i = 1; i < most; ++i)
      others.emplace_back([&, i] {
        {
          std::unique_lock<std::mutex> lock(mutex);
          started.wait(lock, [&] { return ready; });
        }
        if (run) work(i);
      });
  } catch (const std::exception&) {  // the system refuses more threads
  }
  try {
    prepare(static_cast<int>(others.size()) + 1);
  } catch (...) {
    release(false);
    for (std::thread& thread : others) thread.join();
    throw;
  }
  release(true);
  work(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace
