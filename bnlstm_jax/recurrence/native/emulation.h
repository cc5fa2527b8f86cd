// What recurrence.cu uses of CUDA, on a CPU: each CUDA thread is a fiber, and fibers take turns.
//
// A fiber runs until it has to wait for others: at a barrier, a shuffle, or in wait_for_all. So all
// of the kernel but the device's own timing is tested without a GPU. Slow, and for small sizes.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE static inline
#define DEVICE_METHOD inline
#define HOST_DEVICE_METHOD
#define __global__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::now->block->memory

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

static inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

static inline float to_float(__nv_bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace emulation {

struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};

struct Block {
  unsigned char* memory;
  Barrier barrier;
  Barrier warps[32];
  float slots[32][2][32];  // by warp, turn and lane
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Fiber {
  ucontext_t context;
  // Copies under way, by group, the last one open: done as late as may be, when they are waited for.
  std::deque<std::vector<Copy>> copies{1};
  Block* block;
  unsigned thread, index;
  bool done = false;
};

struct Dim {
  unsigned x;
};

static thread_local Fiber* now;
static thread_local ucontext_t scheduler;
static thread_local Dim thread_index, block_index, grid_dim;
static thread_local const std::function<void()>* body;

static inline void yield() { swapcontext(&now->context, &scheduler); }

static inline void wait_at(Barrier& barrier, int count) {
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.turn;
  } else {
    while (barrier.turn == turn) yield();
  }
}

static inline void enter() {
  (*body)();
  now->done = true;
}

static inline void run(int blocks, int threads, size_t memory, const std::function<void()>& kernel) {
  constexpr size_t kStack = 256 * 1024;  // touched where it is used, no more
  std::vector<Block> all(blocks);
  std::vector<Fiber> fibers(static_cast<size_t>(blocks) * threads);
  std::unique_ptr<unsigned char[]> stacks(new unsigned char[kStack * fibers.size()]);
  for (Block& block : all) {
    block.memory = static_cast<unsigned char*>(std::aligned_alloc(128, (memory + 127) / 128 * 128));
    std::memset(block.memory, 0xff, memory);  // NaN, as a read before a write deserves
  }
  body = &kernel;
  grid_dim = {static_cast<unsigned>(blocks)};
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = i % threads;
    fiber.index = i / threads;
    fiber.block = &all[fiber.index];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.get() + kStack * i;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      left = true;
      now = &fiber;
      thread_index = {fiber.thread};
      block_index = {fiber.index};
      swapcontext(&scheduler, &fiber.context);
    }
  }
  for (Block& block : all) std::free(block.memory);
}

static inline float exchange(float x, int from) {
  const unsigned warp = now->thread / 32, lane = now->thread % 32;
  Block& block = *now->block;
  // Whoever is a turn ahead writes the other slots.
  float* slots = block.slots[warp][block.warps[warp].turn % 2];
  slots[lane] = x;
  wait_at(block.warps[warp], 32);
  return slots[from];
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_dim

static inline void __syncthreads() { emulation::wait_at(emulation::now->block->barrier, 256); }
static inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return emulation::exchange(x, emulation::now->thread % 32 ^ mask);
}
static inline int __shfl_xor_sync(unsigned mask, int x, int lanes) {  // small, exact in float
  return static_cast<int>(__shfl_xor_sync(mask, static_cast<float>(x), lanes));
}
static inline float __shfl_sync(unsigned, float x, int lane) { return emulation::exchange(x, lane); }
static inline void increment_release(unsigned* to) { ++*to; }
static inline unsigned load_acquire(const unsigned* from) {
  emulation::yield();
  return *from;
}

static inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  emulation::now->copies.back().push_back({to, from, size});
}
static inline void __pipeline_commit() { emulation::now->copies.emplace_back(); }
static inline void __pipeline_wait_prior(size_t groups) {
  auto& copies = emulation::now->copies;
  for (; copies.size() > groups + 1; copies.pop_front())
    for (const emulation::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.size);
}

// A warp's matrices: every lane has them whole.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  float x[64 * 32];
};

template <int M, int N, int K, typename T>
void fill_fragment(fragment<accumulator, M, N, K, T>& to, float value) {
  for (float& x : to.x) x = value;
}

template <int M, int N, int K, typename T>
void load_matrix_sync(fragment<matrix_a, M, N, K, T, col_major>& to, const T* from, unsigned ld) {
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) to.x[m * K + k] = to_float(from[k * ld + m]);
}

template <int M, int N, int K, typename T>
void load_matrix_sync(fragment<matrix_b, M, N, K, T, row_major>& to, const T* from, unsigned ld) {
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) to.x[k * N + n] = to_float(from[k * ld + n]);
}

template <int M, int N, int K, typename T>
void mma_sync(fragment<accumulator, M, N, K, float>& to,
              const fragment<matrix_a, M, N, K, T, col_major>& a,
              const fragment<matrix_b, M, N, K, T, row_major>& b,
              const fragment<accumulator, M, N, K, float>& c) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = c.x[m * N + n];
      for (int k = 0; k < K; ++k) sum += a.x[m * K + k] * b.x[k * N + n];
      to.x[m * N + n] = sum;
    }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& from, unsigned ld,
                       layout_t) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) to[m * ld + n] = from.x[m * N + n];
}

}  // namespace nvcuda::wmma
