// Aligned arrays in huge pages.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace {

// Asks for huge pages.
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

// Faults in a thread's share of the huge pages before they are used. A page fault costs as much as
// the computation that fills the page, and all threads would wait for the thread that takes it.
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

// An array aligned to cache lines, uninitialised unless `zeros`.
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

}  // namespace
