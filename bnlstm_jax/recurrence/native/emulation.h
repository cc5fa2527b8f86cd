// The parts of CUDA that cuda.cu uses, emulated on a CPU. Each CUDA thread is a fiber, and fibers
// take turns.
//
// A fiber runs until it has to wait for others: at a barrier, a shuffle, or in wait_for_all. All of
// the kernel is thus tested without a GPU, except for effects of the GPU's timing. Emulation is
// slow, for small sizes only.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE static inline
#define DEVICE_METHOD inline
#define BOTH_METHOD
#define __global__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::now->block->memory

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

using std::min;

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
static inline float exponential(float x) { return std::exp(x); }
static inline float divide(float x, float y) { return x / y; }

namespace emulation {

// The emulated device: the number of multiprocessors, and the most shared memory of a block.
struct Device {
  int processors;
  size_t shared_memory;
};
static Device device = {132, 227 * 1024};  // an H200

struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};

struct Words {
  uint32_t of[6];
};

struct Block {
  unsigned char* memory;
  int threads;
  Barrier barriers[16];
  Barrier warps[32];
  Words slots[32][2][32];  // by warp, turn and lane
};

struct Fiber {
  ucontext_t context;
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

static inline void run(int blocks, int threads, size_t memory,
                       const std::function<void()>& kernel) {
  constexpr size_t kStack = 256 * 1024;  // only the pages in use take memory
  std::vector<Block> all(blocks);
  std::vector<Fiber> fibers(static_cast<size_t>(blocks) * threads);
  std::unique_ptr<unsigned char[]> stacks(new unsigned char[kStack * fibers.size()]);
  for (Block& block : all) {
    block.memory = static_cast<unsigned char*>(std::aligned_alloc(128, (memory + 127) / 128 * 128));
    block.threads = threads;
    std::memset(block.memory, 0xff, memory);  // NaN, to expose a read before a write
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

// Returns the words of all lanes of a warp, by lane. All lanes call it together.
static inline const Words* gather(const Words& own) {
  const unsigned warp = now->thread / 32, lane = now->thread % 32;
  Block& block = *now->block;
  // A lane that is one turn ahead writes to the other slots.
  Words* slots = block.slots[warp][block.warps[warp].turn % 2];
  slots[lane] = own;
  wait_at(block.warps[warp], 32);
  return slots;
}

template <typename T>
T exchange(T x, int from) {
  static_assert(sizeof(T) == 4, "a word");
  Words own = {};
  std::memcpy(own.of, &x, 4);
  std::memcpy(&x, gather(own)[from].of, 4);
  return x;
}

static inline float half(uint32_t word, int which) {
  return to_float({static_cast<uint16_t>(word >> 16 * which)});
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_dim

static inline void barrier_of(int id, int threads) {
  emulation::wait_at(emulation::now->block->barriers[id], threads);
}
static inline void __syncthreads() { barrier_of(0, emulation::now->block->threads); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::exchange(x, emulation::now->thread % 32 ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::exchange(x, lane);
}
static inline unsigned __ballot_sync(unsigned, bool x) {
  const emulation::Words* lanes = emulation::gather({{x}});
  unsigned those = 0;
  for (int lane = 0; lane < 32; ++lane) those |= lanes[lane].of[0] << lane;
  return those;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(unsigned x) { return __builtin_ffs(x); }

static inline void increment_release(unsigned* to) { ++*to; }
static inline unsigned load_acquire(const unsigned* from) {
  emulation::yield();
  return *from;
}
template <typename V>
V load_past_l1(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// mma.m16n8k16. Lanes hold the elements that the PTX instruction assigns to them.
static inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulation::Words* lanes = emulation::gather({{a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = emulation::now->thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2, row = lane / 4, lower = i / 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, upper = k / 8;
      d[i] += emulation::half(lanes[row * 4 + pair].of[2 * upper + lower], k % 2) *
              emulation::half(lanes[column * 4 + pair].of[4 + upper], k % 2);
    }
  }
}
