// The recurrence of an LSTM over all time steps, as one kernel for the forward pass and one for the
// backward pass, with batch normalization of the recurrent term and of the cell: equations 6 to 8
// of "Recurrent Batch Normalization". The caller, cuda.py, documents the arguments.
//
// A block of threads owns U hidden units for the whole batch and all time steps. It keeps its part
// of the recurrent kernel in shared memory and its units' cells in registers. Once per time step,
// blocks exchange the hidden state (backward: the gradient of the recurrent term) through the L2
// cache, with one barrier of all blocks.
//
// Arrays are [time, features, batch], so that the lanes of a warp access consecutive rows of the
// batch. The batch is padded to B = 32, 64 or 128 rows; padding has no flags. Gradients are named
// d_*.
//
// A C++ compiler includes emulation.h in place of CUDA's headers; the kernel then runs on a CPU.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>

#include "xla/ffi/api/ffi.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define BOTH_METHOD __host__ __device__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "emulation.h"
#endif

namespace ffi = xla::ffi;

namespace {

using bfloat16 = __nv_bfloat16;

#ifdef __CUDACC__
DEVICE unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

DEVICE void increment_release(unsigned* to) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(to) : "memory");
}

// Fast approximations, with an error of a few roundings.
DEVICE float exponential(float x) { return __expf(x); }
DEVICE float divide(float x, float y) { return __fdividef(x, y); }

// Loads a value that other blocks wrote, past the L1 cache, which may hold an older one.
template <typename V>
DEVICE V load_past_l1(const void* from) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "a load of one instruction");
  V value;
  if constexpr (sizeof(V) == 16)
    reinterpret_cast<uint4&>(value) = __ldcg(static_cast<const uint4*>(from));
  else if constexpr (sizeof(V) == 8)
    reinterpret_cast<uint2&>(value) = __ldcg(static_cast<const uint2*>(from));
  else
    reinterpret_cast<unsigned&>(value) = __ldcg(static_cast<const unsigned*>(from));
  return value;
}

// A barrier of some of a block's threads. __syncthreads uses barrier 0.
DEVICE void barrier_of(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// d += a b for matrices a [16, 16] and b [16, 8], distributed over the lanes of a warp.
DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

constexpr int kWarp = 32;
constexpr unsigned kLanes = 0xffffffffu;
constexpr int kTile = 32;  // rows of a bfloat16 operand in a tile; each mma takes 16

// Flags of a row of the batch at a time step. kValid: the step is not padding. Others: the row
// counts in the moments of that term.
enum Flag : uint8_t { kValid = 1, kInRecurrent = 2, kInCell = 4 };

struct Arguments {
  int steps, units;
  bool normalize_recurrent, normalize_cell;
  bool given;  // statistics are given; otherwise the forward pass computes them from the batch
  bool keep;   // the forward pass writes residuals for the backward pass
  float epsilon;
  const void* kernel;            // [H, 4H]
  const float* pre_activation;   // [T, 4H, B], input term and bias
  const uint8_t* flags;          // [T, B]
  const float* recurrent_scale;  // [4H]
  const float* cell_scale;       // [H]
  const float* cell_bias;        // [H]
  const float* first_cell;       // [H, B]
  const float* first_hidden;     // [H, B]
  // Outputs of the forward pass, inputs of the backward pass.
  float* recurrent_statistics;  // [T, 2, 4H], mean and variance
  float* cell_statistics;       // [T, 2, H]
  float* hidden;                // [T, H, B]
  float* cell;                  // [T, H, B]
  float* recurrent_term;        // [T, 4H, B]
  // Gradients of the outputs, then the gradients that the backward pass computes.
  const float* d_hidden;     // [T, H, B], includes the gradient of the last carry's h
  const float* d_last_cell;  // [H, B]
  float* d_pre_activation;   // [T, 4H, B]
  float* d_recurrent_term;   // [T, 4H, B]
  float* d_recurrent_scale;  // [4H]
  float* d_cell_scale;       // [H]
  float* d_cell_bias;        // [H]
  float* d_first_cell;       // [H, B]
  float* d_first_hidden;     // [H, B]
  // Two buffers for the exchange between blocks, `Operand`s of H rows (forward) or 4H (backward);
  // the counter of the barrier.
  void* exchange;
  unsigned* arrived;
};

// How the warps of a block divide its U units and B rows of the batch.
template <int U, int B>
struct Sharing {
  // Outside products, kWarpsOfUnit warps have one unit, and each of their lanes has kRows rows.
  static constexpr int kWarpsOfUnit = U * B > 512 ? B / 64 : B / 32;
  static constexpr int kRows = B / (kWarp * kWarpsOfUnit);
  static constexpr int kOwners = U * kWarpsOfUnit;
  static constexpr int kWarps = kOwners < 8 ? 8 : kOwners;
  static constexpr int kThreads = kWarp * kWarps;
  // In products, each group of warps has kGroupRows rows of the batch, and its kParts warps divide
  // the sum over the operand's rows.
  static constexpr int kGroupRows = B < 64 ? B : 64;
  static constexpr int kGroups = B / kGroupRows;
  static constexpr int kParts = kWarps / kGroups;
};

// The unit and the rows of the batch of a thread.
template <int U, int B>
struct Place {
  using By = Sharing<U, B>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int own = warp / By::kWarpsOfUnit;   // which of the block's units
  const int part = warp % By::kWarpsOfUnit;  // which of that unit's warps
  const int unit = blockIdx.x * U + own;
  const bool owner;

  DEVICE_METHOD explicit Place(int units) : owner(warp < By::kOwners && unit < units) {}
  DEVICE_METHOD int row(int r) const { return (part * By::kRows + r) * kWarp + lane; }
};

// ---- Nonlinearities, without branches, so that several can overlap. With an exact exponential,
// the relative error of tanh and the absolute error of the sigmoid are below 3e-7.

DEVICE float sigmoid(float x) { return divide(1.f, 1.f + exponential(-x)); }

DEVICE float hyperbolic_tangent(float x) {
  const float square = x * x;
  float small = fmaf(square, 0.01643751f, -0.05267177f);  // a polynomial, fitted up to 0.55
  small = fmaf(square, small, 0.13320725f);
  small = fmaf(square, small, -0.33332947f);
  small = fmaf(x * square, small, x);
  const float large = 1.f - divide(2.f, 1.f + exponential(2.f * fabsf(x)));
  return fabsf(x) < 0.55f ? small : copysignf(large, x);
}

// ---- Sums over the batch.

// Sums N values over the lanes of a warp.
template <int N>
DEVICE void warp_sums(float (&x)[N]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(kLanes, x[n], distance);
}

// Gives all warps of a unit the N values of each of them. `slots` [units, warps of a unit, N] must
// not be used again before the next barrier of the block.
template <int N, int U, int B>
DEVICE void gather(float (&all)[Sharing<U, B>::kWarpsOfUnit][N], const float (&own)[N],
                   float* slots, const Place<U, B>& at) {
  constexpr int W = Sharing<U, B>::kWarpsOfUnit;
  static_assert(N % 4 == 0, "read as vectors");
  if (W == 1) {
#pragma unroll
    for (int n = 0; n < N; ++n) all[0][n] = own[n];
    return;
  }
  float* of_unit = slots + at.own * W * N;
  if (at.lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) of_unit[at.part * N + n] = own[n];
  }
  barrier_of(1 + at.own, kWarp * W);
#pragma unroll
  for (int w = 0; w < W; ++w)
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(of_unit + w * N + n);
      all[w][n] = four.x;
      all[w][n + 1] = four.y;
      all[w][n + 2] = four.z;
      all[w][n + 3] = four.w;
    }
}

struct Moments {
  float mean, inverse;  // 1 / sqrt(variance + epsilon)
};

// Computes the moments of F features of a unit over the rows that count, and writes them to
// `statistics`: the mean of feature f at `index + f * stride`, its variance `size` elements later.
// Each warp subtracts the value of its first row that counts; the warps' means are then pooled as
// offsets from one of them. The mean of equal values is therefore exact. Mean and variance are zero
// if no row counts.
template <int F, int U, int B>
DEVICE void batch_moments(Moments (&moments)[F], const float (&x)[F][Sharing<U, B>::kRows],
                          const bool (&counts)[Sharing<U, B>::kRows], float epsilon,
                          float* statistics, int size, int index, int stride, float* slots,
                          const Place<U, B>& at) {
  constexpr int R = Sharing<U, B>::kRows, W = Sharing<U, B>::kWarpsOfUnit;
  constexpr int N = (2 * F + 1 + 3) / 4 * 4;
  float own[N] = {}, all[W][N], origins[F], sums[F] = {}, squares[F] = {};
  int rows = 0, first = 0, first_r = 0;
#pragma unroll
  for (int r = R - 1; r >= 0; --r) {
    const unsigned those = __ballot_sync(kLanes, counts[r]);
    rows += __popc(those);
    first = those ? __ffs(those) - 1 : first;
    first_r = those ? r : first_r;
  }
  const float share = divide(1.f, fmaxf(rows, 1.f));
#pragma unroll
  for (int f = 0; f < F; ++f) {
    float candidate = x[f][0];
#pragma unroll
    for (int r = 1; r < R; ++r) candidate = first_r == r ? x[f][r] : candidate;
    origins[f] = __shfl_sync(kLanes, candidate, first);
#pragma unroll
    for (int r = 0; r < R; ++r) sums[f] += counts[r] ? x[f][r] - origins[f] : 0.f;
  }
  warp_sums(sums);
#pragma unroll
  for (int f = 0; f < F; ++f) {
    own[f] = origins[f] + sums[f] * share;
#pragma unroll
    for (int r = 0; r < R; ++r)
      squares[f] += counts[r] ? (x[f][r] - own[f]) * (x[f][r] - own[f]) : 0.f;
  }
  warp_sums(squares);
#pragma unroll
  for (int f = 0; f < F; ++f) own[F + f] = squares[f];
  own[2 * F] = rows;
  gather(all, own, slots, at);
  float total = 0;
#pragma unroll
  for (int w = 0; w < W; ++w) total += all[w][2 * F];
  const float inverse_total = divide(1.f, fmaxf(total, 1.f));
#pragma unroll
  for (int f = 0; f < F; ++f) {
    float origin = 0, sum = 0, square = 0;
#pragma unroll
    for (int w = W - 1; w >= 0; --w) origin = all[w][2 * F] > 0 ? all[w][f] : origin;
#pragma unroll
    for (int w = 0; w < W; ++w)
      sum += all[w][2 * F] > 0 ? all[w][2 * F] * (all[w][f] - origin) : 0.f;
    const float mean = origin + sum * inverse_total;
#pragma unroll
    for (int w = 0; w < W; ++w)
      square += all[w][2 * F] > 0
                    ? all[w][F + f] + all[w][2 * F] * (all[w][f] - mean) * (all[w][f] - mean)
                    : 0.f;
    const float variance = square * inverse_total;
    moments[f] = {mean, rsqrtf(variance + epsilon)};
    if (at.part == 0 && at.lane == 0) {
      statistics[index + f * stride] = mean;
      statistics[index + f * stride + size] = variance;
    }
  }
}

// Moments from `statistics`, laid out as above.
template <int F>
DEVICE void known_moments(Moments (&moments)[F], const float* statistics, int size, int index,
                          int stride, float epsilon) {
#pragma unroll
  for (int f = 0; f < F; ++f)
    moments[f] = {statistics[index + f * stride],
                  rsqrtf(statistics[index + f * stride + size] + epsilon)};
}

// The backward pass of scale * (x - mean) * inverse for F features of a unit. Replaces `d`, the
// gradient of the result, by the gradient of x. Writes the sums of the given `d` over the batch to
// `sums`, and the gradients of the scales to `d_scale`.
template <int F, int U, int B>
DEVICE void normalize_backward(float (&d)[F][Sharing<U, B>::kRows], float (&sums)[F],
                               float (&d_scale)[F], const float (&x)[F][Sharing<U, B>::kRows],
                               const Moments (&moments)[F], const float (&scale)[F],
                               const bool (&counts)[Sharing<U, B>::kRows], bool given, float* slots,
                               const Place<U, B>& at) {
  constexpr int R = Sharing<U, B>::kRows, W = Sharing<U, B>::kWarpsOfUnit;
  constexpr int N = (2 * F + 1 + 3) / 4 * 4;
  float own[N] = {}, all[W][N];
#pragma unroll
  for (int f = 0; f < F; ++f)
#pragma unroll
    for (int r = 0; r < R; ++r) {
      own[f] += d[f][r];
      own[F + f] += d[f][r] * (x[f][r] - moments[f].mean);
    }
#pragma unroll
  for (int r = 0; r < R; ++r) own[2 * F] += counts[r];
  warp_sums(own);
  gather(all, own, slots, at);
  float rows = 0;
#pragma unroll
  for (int w = 0; w < W; ++w) rows += all[w][2 * F];
  const float share = divide(1.f, fmaxf(rows, 1.f));
#pragma unroll
  for (int f = 0; f < F; ++f) {
    float d_inverse = 0;
    sums[f] = 0;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sums[f] += all[w][f];
      d_inverse += all[w][F + f];
    }
    const float inverse = moments[f].inverse;
    d_scale[f] = inverse * d_inverse;
    const float mean = sums[f] * share, slope = inverse * d_scale[f] * share;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      // Given moments do not depend on the rows: NaN in one of them must not reach the others.
      const float shift = given ? 0.f : mean + (x[f][r] - moments[f].mean) * slope;
      d[f][r] = counts[r] ? scale[f] * inverse * (d[f][r] - shift) : 0.f;
    }
  }
}

// ---- Products of the block's columns of the kernel with the operand that blocks exchange.

// The matrix that blocks exchange: K rows of B elements, in the order in which lanes read them. A
// buffer has room for K rounded up to whole tiles.
template <typename T, int B>
struct Operand {
  T* data;
  int rows;

  DEVICE_METHOD Operand(void* exchange, int rows, int buffer)
      : data(static_cast<T*>(exchange) + static_cast<size_t>(buffer) * tiles(rows) * kTile * B),
        rows(rows) {}
  BOTH_METHOD static constexpr int tiles(int rows) { return (rows + kTile - 1) / kTile; }
  // float32 is [K, B]. bfloat16 is [tile, row of the batch, kTile]: a lane reads eight consecutive
  // elements, and each mma takes four of them.
  DEVICE_METHOD T& at(int k, int row) const {
    if constexpr (sizeof(T) == 4) return data[static_cast<size_t>(k) * B + row];
    return data[(static_cast<size_t>(k / kTile) * B + row) * kTile + k % kTile];
  }
};

DEVICE void assign(float& to, float x) { to = x; }
DEVICE void assign(bfloat16& to, float x) { to = __float2bfloat16(x); }

// A warp's part of a product: its group's rows of the batch, C columns, its share of the operand's
// rows.
template <typename T, int C, int U, int B>
struct Sums;

// A lane has kVector consecutive rows of the batch. If a group's rows need only some of the lanes,
// the other lanes take the next rows of the operand.
template <int C, int U, int B>
struct Sums<float, C, U, B> {
  using By = Sharing<U, B>;
  static constexpr int kVector = C > 8 ? 2 : 4;
  static constexpr int kLanesOfRow = By::kGroupRows / kVector;
  static constexpr int kRowsOfLoad = kWarp / kLanesOfRow;
  static constexpr int kAhead = C > 16 ? 2 : By::kWarps > 8 ? 4 : 8;  // loads that registers allow
  static constexpr int kColumns = C < 4 ? C : 4;  // weights in one load
  static_assert(kLanesOfRow * kRowsOfLoad == kWarp, "lanes by rows");
  float sums[C][kVector] = {};

  BOTH_METHOD static constexpr size_t weight_bytes(int rows) { return sizeof(float) * C * rows; }
  DEVICE_METHOD static float& weight(float* weights, int, int k, int column) {
    return weights[k * C + column];
  }

  DEVICE_METHOD void add(const float* weights, const Operand<float, B>& operand, int group,
                         int part, int lane) {
    struct alignas(sizeof(float) * kVector) Vector {
      float x[kVector];
    };
    struct alignas(sizeof(float) * kColumns) Weights {
      float x[kColumns];
    };
    constexpr int kStep = By::kParts * kRowsOfLoad;
    const int first = part * kRowsOfLoad + lane / kLanesOfRow;
    const float* from = operand.data + group * By::kGroupRows + lane % kLanesOfRow * kVector;
    Vector ahead[kAhead], now[kAhead];
    auto read = [&](Vector(&to)[kAhead], int k) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = k + i * kStep;
        to[i] = Vector{};
        if (row < operand.rows) to[i] = load_past_l1<Vector>(from + static_cast<size_t>(row) * B);
      }
    };
    read(ahead, first);
    // Rows beyond the last one are read as zeros, which avoids branches in the sums.
    for (int k = first; k - first < operand.rows - part * kRowsOfLoad; k += kAhead * kStep) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) now[i] = ahead[i];
      read(ahead, k + kAhead * kStep);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = min(k + i * kStep, operand.rows - 1);
#pragma unroll
        for (int c = 0; c < C; c += kColumns) {
          const Weights w = *reinterpret_cast<const Weights*>(weights + row * C + c);
#pragma unroll
          for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              sums[c + n][v] = fmaf(w.x[n], now[i].x[v], sums[c + n][v]);
        }
      }
    }
#pragma unroll
    for (int distance = kLanesOfRow; distance < kWarp; distance *= 2)
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          sums[c][v] += __shfl_xor_sync(kLanes, sums[c][v], distance);
  }

  template <typename F>
  DEVICE_METHOD void each(int group, int lane, F f) {
    if (lane >= kLanesOfRow) return;
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        f(c, group * By::kGroupRows + lane * kVector + v, sums[c][v]);
  }
};

// Uses the tensor cores, in tiles [16 rows of the batch, 16 rows of the operand, 8 columns]. The
// operand's rows may have any order in a tile if both factors have the same order: here, a lane's
// four rows are consecutive.
template <int C, int U, int B>
struct Sums<bfloat16, C, U, B> {
  using By = Sharing<U, B>;
  static constexpr int kHeight = By::kGroupRows / 16, kWidth = (C + 7) / 8;
  float sums[kHeight][kWidth][4] = {};

  BOTH_METHOD static constexpr size_t weight_bytes(int rows) {
    return sizeof(bfloat16) * kWidth * 8 * kTile * Operand<bfloat16, B>::tiles(rows);
  }
  // Weights are [column / 8, tile, column % 8, kTile].
  DEVICE_METHOD static bfloat16& weight(bfloat16* weights, int rows, int k, int column) {
    const int tile = column / 8 * Operand<bfloat16, B>::tiles(rows) + k / kTile;
    return weights[(tile * 8 + column % 8) * kTile + k % kTile];
  }

  DEVICE_METHOD void add(const bfloat16* weights, const Operand<bfloat16, B>& operand, int group,
                         int part, int lane) {
    const int tiles = Operand<bfloat16, B>::tiles(operand.rows);
    const int share = (tiles + By::kParts - 1) / By::kParts;
    const int begin = part * share, end = min(begin + share, tiles);
    const bfloat16* from = operand.data + (group * By::kGroupRows * 4 + lane) * 8;
#pragma unroll(kWidth == 1 ? 2 : 1)
    for (int tile = begin; tile < end; ++tile) {
      uint4 rows[kHeight][2];
#pragma unroll
      for (int h = 0; h < kHeight; ++h)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          rows[h][half] = load_past_l1<uint4>(
              from + (static_cast<size_t>(tile) * B + 16 * h + 8 * half) * kTile);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        const uint4 w =
            *reinterpret_cast<const uint4*>(weights + ((n * tiles + tile) * kWarp + lane) * 8);
#pragma unroll
        for (int h = 0; h < kHeight; ++h) {
          const uint4 x = rows[h][0], y = rows[h][1];
          multiply_add(sums[h][n], {x.x, y.x, x.y, y.y}, w.x, w.y);
          multiply_add(sums[h][n], {x.z, y.z, x.w, y.w}, w.z, w.w);
        }
      }
    }
  }

  template <typename F>
  DEVICE_METHOD void each(int group, int lane, F f) {
#pragma unroll
    for (int h = 0; h < kHeight; ++h)
#pragma unroll
      for (int n = 0; n < kWidth; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * n + 2 * (lane % 4) + i % 2;
          if (column < C)
            f(column, group * By::kGroupRows + 16 * h + 8 * (i / 2) + lane / 4, sums[h][n][i]);
        }
  }
};

// Writes a block's rows of the operand, G for each unit.
template <typename T, int G, int U, int B>
struct Outbox;

template <int G, int U, int B>
struct Outbox<float, G, U, B> {
  static constexpr size_t kBytes = 0;
  const Operand<float, B> operand;

  DEVICE_METHOD Outbox(unsigned char*, const Operand<float, B>& operand) : operand(operand) {}
  DEVICE_METHOD void put(int own, int which, int row, float x) {
    operand.at((blockIdx.x * U + own) * G + which, row) = x;
  }
  DEVICE_METHOD void send() {}
};

// Collects the values in shared memory, [row of the batch, kPitch bytes], to write whole vectors.
template <int G, int U, int B>
struct Outbox<bfloat16, G, U, B> {
  static constexpr int kValues = G * U, kVector = kValues < 8 ? kValues : 8;
  static constexpr int kPitch = kValues * 2 + 16;
  static constexpr size_t kBytes = kPitch * B;
  unsigned char* const memory;
  const Operand<bfloat16, B> operand;

  DEVICE_METHOD Outbox(unsigned char* memory, const Operand<bfloat16, B>& operand)
      : memory(memory), operand(operand) {}
  DEVICE_METHOD bfloat16& value(int index, int row) {
    return reinterpret_cast<bfloat16*>(memory + row * kPitch)[index];
  }
  DEVICE_METHOD void put(int own, int which, int row, float x) {
    value(own * G + which, row) = __float2bfloat16(x);
  }
  DEVICE_METHOD void send() {
    struct alignas(2 * kVector) Vector {
      bfloat16 x[kVector];
    };
    __syncthreads();
    for (int i = threadIdx.x; i < B * kValues / kVector; i += Sharing<U, B>::kThreads) {
      const int row = i / (kValues / kVector), index = i % (kValues / kVector) * kVector;
      *reinterpret_cast<Vector*>(&operand.at(blockIdx.x * kValues + index, row)) =
          *reinterpret_cast<const Vector*>(&value(index, row));
    }
  }
};

// Shared memory of a block, for a product of C columns and an Outbox of G rows for each unit.
template <typename T, int C, int G, int U, int B>
struct Shared {
  using By = Sharing<U, B>;
  using Warp = Sums<T, C, U, B>;
  static constexpr int kPitch = B + 4;  // avoids bank conflicts when lanes store sums
  static constexpr int kSlots = By::kParts / 2;
  static_assert(By::kParts % 2 == 0, "two warps share a slot");
  static constexpr int kGathered = U * By::kWarpsOfUnit * 12;  // of each of two gathers in a step
  static constexpr size_t kOutboxBytes = Outbox<T, G, U, B>::kBytes;
  T* weights;
  float* sums;            // [kSlots, C, kPitch]
  float* gathered;        // [2, kGathered]
  unsigned char* outbox;  // memory of an Outbox
  int rows;

  BOTH_METHOD static constexpr size_t weight_bytes(int rows) {
    return (Warp::weight_bytes(rows) + 15) / 16 * 16;
  }
  static constexpr size_t bytes(int rows) {
    return weight_bytes(rows) + sizeof(float) * (kSlots * C * kPitch + 2 * kGathered) +
           kOutboxBytes;
  }

  DEVICE_METHOD Shared(unsigned char* memory, int rows)
      : weights(reinterpret_cast<T*>(memory)),
        sums(reinterpret_cast<float*>(memory + weight_bytes(rows))),
        gathered(sums + kSlots * C * kPitch),
        outbox(reinterpret_cast<unsigned char*>(gathered + 2 * kGathered)),
        rows(rows) {
    // Units beyond the last one send zeros.
    for (int i = threadIdx.x; i < kOutboxBytes; i += By::kThreads) outbox[i] = 0;
    if (kOutboxBytes) __syncthreads();
  }

  // Loads the kernel's elements `of(k, column)`, and zeros as padding.
  template <typename F>
  DEVICE_METHOD void load_weights(F of) {
    constexpr int kColumns = sizeof(T) == 2 ? (C + 7) / 8 * 8 : C;
    const int padded = sizeof(T) == 2 ? Operand<T, B>::tiles(rows) * kTile : rows;
    for (int i = threadIdx.x; i < padded * kColumns; i += By::kThreads) {
      const int k = i / kColumns, column = i % kColumns;
      T& weight = Warp::weight(weights, rows, k, column);
      if (k < rows && column < C)
        weight = of(k, column);
      else
        assign(weight, 0.f);
    }
  }

  // All threads of the block call it. Afterwards, `product` gives the result.
  DEVICE_METHOD void multiply(const Operand<T, B>& operand, int warp, int lane) {
    const int group = warp % By::kGroups, part = warp / By::kGroups;
    Warp own;
    own.add(weights, operand, group, part, lane);
    // Two warps share a slot: one stores its sums, then the other adds its own.
    float* slot = sums + part % kSlots * C * kPitch;
    if (part < kSlots)
      own.each(group, lane, [&](int c, int row, float x) { slot[c * kPitch + row] = x; });
    __syncthreads();
    if (part >= kSlots)
      own.each(group, lane, [&](int c, int row, float x) { slot[c * kPitch + row] += x; });
    __syncthreads();
  }

  DEVICE_METHOD float product(int column, int row) const {
    float sum = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) sum += sums[(slot * C + column) * kPitch + row];
    return sum;
  }
};

// Zeroes the elements of the last tile beyond the operand's rows, in both buffers. Only block 0
// does so.
template <typename T, int U, int B>
DEVICE void clear_padding(void* exchange, int rows) {
  if (sizeof(T) == 4 || blockIdx.x > 0) return;
  const int padding = Operand<T, B>::tiles(rows) * kTile - rows;
  for (int i = threadIdx.x; i < 2 * padding * B; i += Sharing<U, B>::kThreads) {
    const Operand<T, B> operand(exchange, rows, i / (padding * B));
    assign(operand.at(rows + i / B % padding, i % B), 0.f);
  }
}

// A barrier of all blocks, in two halves: after its wait for a turn, a block sees everything that
// any block wrote before it arrived for that turn.
DEVICE void arrive(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) increment_release(arrived);
}

DEVICE void wait_for_all(const unsigned* arrived, unsigned turn) {
  if (threadIdx.x == 0)
    while (load_acquire(arrived) < turn * gridDim.x);
  __syncthreads();
}

// ---- Forward.

template <typename T, int U, int B>
__global__ void __launch_bounds__(Sharing<U, B>::kThreads, 1) forward(Arguments a) {
  DYNAMIC_SHARED(memory);
  constexpr int R = Sharing<U, B>::kRows;
  const int H = a.units;
  const Place<U, B> at(H);
  const int unit = at.unit;
  const T* kernel = static_cast<const T*>(a.kernel);
  Shared<T, 4 * U, 1, U, B> shared(memory, H);
  shared.load_weights([&](int k, int column) {  // column: 4 unit + gate
    const int of = blockIdx.x * U + column / 4;
    T zero;
    assign(zero, 0.f);
    return of < H ? kernel[static_cast<size_t>(k) * 4 * H + column % 4 * H + of] : zero;
  });
  clear_padding<T, U, B>(a.exchange, H);
  float c[R], h[R], scale[4], cell_scale = 1, cell_bias = 0;
  Outbox<T, 1, U, B> first(shared.outbox, Operand<T, B>(a.exchange, H, 0));
  if (at.owner) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      c[r] = a.first_cell[unit * B + at.row(r)];
      h[r] = a.first_hidden[unit * B + at.row(r)];
      first.put(at.own, 0, at.row(r), h[r]);
    }
    cell_scale = a.cell_scale[unit];
    cell_bias = a.cell_bias[unit];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) scale[gate] = a.recurrent_scale[gate * H + unit];
  }
  first.send();
  arrive(a.arrived);
  wait_for_all(a.arrived, 1);

  for (int t = 0; t < a.steps; ++t) {
    const size_t gates_at = static_cast<size_t>(t) * 4 * H, units_at = static_cast<size_t>(t) * H;
    uint8_t flags[R] = {};
    float terms[4][R], recurrent[4][R];
    if (at.owner) {  // loaded before the product, which hides the latency
#pragma unroll
      for (int r = 0; r < R; ++r) {
        flags[r] = a.flags[static_cast<size_t>(t) * B + at.row(r)];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          terms[gate][r] = a.pre_activation[(gates_at + gate * H + unit) * B + at.row(r)];
      }
    }
    shared.multiply(Operand<T, B>(a.exchange, H, t % 2), at.warp, at.lane);
    Outbox<T, 1, U, B> out(shared.outbox, Operand<T, B>(a.exchange, H, (t + 1) % 2));
    if (at.owner) {
      bool in_recurrent[R], in_cell[R];
      Moments moments[4] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}}, of_cell[1] = {{0, 1}};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        in_recurrent[r] = flags[r] & kInRecurrent;
        in_cell[r] = flags[r] & kInCell;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          recurrent[gate][r] = shared.product(4 * at.own + gate, at.row(r));
      }
      if (a.normalize_recurrent) {
        float* statistics = a.recurrent_statistics + 2 * gates_at;
        if (a.given)
          known_moments(moments, statistics, 4 * H, unit, H, a.epsilon);
        else
          batch_moments(moments, recurrent, in_recurrent, a.epsilon, statistics, 4 * H, unit, H,
                        shared.gathered, at);
      }
      float cell[1][R], gates[4][R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const float factor = a.normalize_recurrent ? scale[gate] * moments[gate].inverse : 1.f;
          const float x = terms[gate][r] + factor * (recurrent[gate][r] - moments[gate].mean);
          gates[gate][r] = gate < 3 ? sigmoid(x) : hyperbolic_tangent(x);  // f, i, o, g: (6)
        }
        if (flags[r] & kValid) c[r] = gates[0][r] * c[r] + gates[1][r] * gates[3][r];  // (7)
        cell[0][r] = c[r];
      }
      if (a.normalize_cell) {
        float* statistics = a.cell_statistics + 2 * units_at;
        if (a.given)
          known_moments(of_cell, statistics, H, unit, 0, a.epsilon);
        else
          batch_moments(of_cell, cell, in_cell, a.epsilon, statistics, H, unit, 0,
                        shared.gathered + shared.kGathered, at);
      }
      const float factor = a.normalize_cell ? cell_scale * of_cell[0].inverse : 1.f;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (flags[r] & kValid)
          h[r] = gates[2][r] *
                 hyperbolic_tangent(factor * (c[r] - of_cell[0].mean) + cell_bias);  // (8)
        out.put(at.own, 0, at.row(r), h[r]);
      }
    }
    out.send();
    arrive(a.arrived);
    if (at.owner) {  // after `arrive`: no other block waits for these results
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const size_t here = (units_at + unit) * B + at.row(r);
        a.hidden[here] = h[r];
        if (!a.keep) continue;
        a.cell[here] = c[r];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          a.recurrent_term[(gates_at + gate * H + unit) * B + at.row(r)] = recurrent[gate][r];
      }
    }
    wait_for_all(a.arrived, t + 2);
  }
  if (a.keep || !at.owner) return;
#pragma unroll
  for (int r = 0; r < R; ++r) a.cell[unit * B + at.row(r)] = c[r];  // only the last one
}

// ---- Backward.

// Residuals, inputs and the output's gradient of a unit at a time step, as read from memory.
template <int R>
struct Read {
  uint8_t flags[R] = {};
  float recurrent[4][R], terms[4][R], before[R], d_output[R];
  float means[5] = {}, variances[5] = {};  // of the recurrent term's gates and of the cell

  template <int U, int B>
  DEVICE_METHOD void read(const Arguments& a, int t, const Place<U, B>& at) {
    const int H = a.units, unit = at.unit;
    const size_t gates_at = static_cast<size_t>(t) * 4 * H, units_at = static_cast<size_t>(t) * H;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = at.row(r);
      flags[r] = a.flags[static_cast<size_t>(t) * B + row];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const size_t here = (gates_at + gate * H + unit) * B + row;
        recurrent[gate][r] = a.recurrent_term[here];
        terms[gate][r] = a.pre_activation[here];
      }
      before[r] = t > 0 ? a.cell[(units_at - H + unit) * B + row] : a.first_cell[unit * B + row];
      d_output[r] = a.d_hidden[(units_at + unit) * B + row];
    }
    if (a.normalize_recurrent) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        means[gate] = a.recurrent_statistics[2 * gates_at + gate * H + unit];
        variances[gate] = a.recurrent_statistics[2 * gates_at + (4 + gate) * H + unit];
      }
    }
    if (a.normalize_cell) {
      means[4] = a.cell_statistics[2 * units_at + unit];
      variances[4] = a.cell_statistics[2 * units_at + H + unit];
    }
  }
};

// A recomputed forward step. Its cell is the `before` of the step after it, or the last cell.
template <int R>
struct Step : Read<R> {
  float gates[4][R], c[1][R], output[R];
  Moments moments[4], of_cell[1];

  DEVICE_METHOD void compute(const Arguments& a, const Read<R>& read, const float (&cell)[R],
                             const float (&scale)[4], float cell_scale, float cell_bias) {
#pragma unroll
    for (int r = 0; r < R; ++r) c[0][r] = cell[r];
    static_cast<Read<R>&>(*this) = read;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      moments[gate] = {read.means[gate],
                       a.normalize_recurrent ? rsqrtf(read.variances[gate] + a.epsilon) : 1.f};
    of_cell[0] = {read.means[4], a.normalize_cell ? rsqrtf(read.variances[4] + a.epsilon) : 1.f};
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const Moments& m = moments[gate];
        const float factor = a.normalize_recurrent ? scale[gate] * m.inverse : 1.f;
        const float x = this->terms[gate][r] + factor * (this->recurrent[gate][r] - m.mean);
        gates[gate][r] = gate < 3 ? sigmoid(x) : hyperbolic_tangent(x);
      }
      const Moments& m = of_cell[0];
      const float factor = a.normalize_cell ? cell_scale * m.inverse : 1.f;
      output[r] = hyperbolic_tangent(factor * (c[0][r] - m.mean) + cell_bias);
    }
  }
};

template <typename T, int U, int B>
__global__ void __launch_bounds__(Sharing<U, B>::kThreads, 1) backward(Arguments a) {
  DYNAMIC_SHARED(memory);
  constexpr int R = Sharing<U, B>::kRows;
  constexpr bool kEarly = R == 1;  // reads a step ahead, if registers allow it
  const int H = a.units;
  const Place<U, B> at(H);
  const int unit = at.unit;
  const T* kernel = static_cast<const T*>(a.kernel);
  Shared<T, U, 4, U, B> shared(memory, 4 * H);
  shared.load_weights([&](int k, int column) {  // k: 4 unit + gate
    const int of = blockIdx.x * U + column;
    T zero;
    assign(zero, 0.f);
    return of < H ? kernel[static_cast<size_t>(of) * 4 * H + k % 4 * H + k / 4] : zero;
  });
  clear_padding<T, U, B>(a.exchange, 4 * H);
  float d_c[R], d_h[R] = {}, scale[4], cell_scale[1] = {1}, cell_bias = 0;
  float d_scale[4] = {}, d_cell_scale = 0, d_cell_bias = 0;
  Step<R> step;
  if (at.owner) {
    float last[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      d_c[r] = a.d_last_cell[unit * B + at.row(r)];
      last[r] = a.cell[(static_cast<size_t>(a.steps - 1) * H + unit) * B + at.row(r)];
    }
    cell_scale[0] = a.cell_scale[unit];
    cell_bias = a.cell_bias[unit];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) scale[gate] = a.recurrent_scale[gate * H + unit];
    Read<R> read;
    read.read(a, a.steps - 1, at);
    step.compute(a, read, last, scale, cell_scale[0], cell_bias);
  }

  for (int t = a.steps - 1; t >= 0; --t) {
    const size_t gates_at = static_cast<size_t>(t) * 4 * H;
    float d_terms[4][R], d_recurrent[4][R];
    Outbox<T, 4, U, B> out(shared.outbox, Operand<T, B>(a.exchange, 4 * H, t % 2));
    Read<R> next;
    if (at.owner) {
      if (kEarly && t > 0) next.read(a, t - 1, at);
      bool in_recurrent[R], in_cell[R];
      float d_cell[1][R], sum[1], d_this_scale[1], sums[4], d_these_scales[4];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        in_recurrent[r] = step.flags[r] & kInRecurrent;
        in_cell[r] = step.flags[r] & kInCell;
        d_h[r] += step.d_output[r];
        const float d = step.flags[r] & kValid ? d_h[r] : 0.f, o = step.gates[2][r];
        d_terms[2][r] = d * step.output[r] * o * (1 - o);
        d_cell[0][r] = d * o * (1 - step.output[r] * step.output[r]);
      }
      float d_unnormalized[R];
#pragma unroll
      for (int r = 0; r < R; ++r) d_unnormalized[r] = d_cell[0][r];
      normalize_backward(d_cell, sum, d_this_scale, step.c, step.of_cell, cell_scale, in_cell,
                         a.given, shared.gathered, at);
      d_cell_bias += sum[0];
      if (a.normalize_cell) d_cell_scale += d_this_scale[0];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        d_c[r] += a.normalize_cell ? d_cell[0][r] : d_unnormalized[r];
        const bool valid = step.flags[r] & kValid;
        const float d = valid ? d_c[r] : 0.f;
        const float f = step.gates[0][r], i = step.gates[1][r], g = step.gates[3][r];
        d_terms[0][r] = d * step.before[r] * f * (1 - f);
        d_terms[1][r] = d * g * i * (1 - i);
        d_terms[3][r] = d * i * (1 - g * g);
        if (valid) d_c[r] *= f;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) d_recurrent[gate][r] = d_terms[gate][r];
      }
      if (a.normalize_recurrent) {
        normalize_backward(d_recurrent, sums, d_these_scales, step.recurrent, step.moments, scale,
                           in_recurrent, a.given, shared.gathered + shared.kGathered, at);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) d_scale[gate] += d_these_scales[gate];
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) out.put(at.own, gate, at.row(r), d_recurrent[gate][r]);
    }
    out.send();
    arrive(a.arrived);
    bool valid[R] = {};
    if (at.owner) {  // after `arrive`: results that no other block waits for, and the next step
#pragma unroll
      for (int r = 0; r < R; ++r) {
        valid[r] = step.flags[r] & kValid;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const size_t here = (gates_at + gate * H + unit) * B + at.row(r);
          a.d_pre_activation[here] = d_terms[gate][r];
          a.d_recurrent_term[here] = d_recurrent[gate][r];
        }
      }
      if (t > 0) {
        if (!kEarly) next.read(a, t - 1, at);
        float cell[R];
#pragma unroll
        for (int r = 0; r < R; ++r) cell[r] = step.before[r];
        step.compute(a, next, cell, scale, cell_scale[0], cell_bias);
      }
    }
    wait_for_all(a.arrived, a.steps - t);
    shared.multiply(out.operand, at.warp, at.lane);
    if (at.owner) {
#pragma unroll
      for (int r = 0; r < R; ++r)  // a row that is not valid keeps its gradient for step t - 1
        d_h[r] = (valid[r] ? 0.f : d_h[r]) + shared.product(at.own, at.row(r));
    }
  }
  if (!at.owner) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    a.d_first_cell[unit * B + at.row(r)] = d_c[r];
    a.d_first_hidden[unit * B + at.row(r)] = d_h[r];
  }
  if (at.part > 0 || at.lane > 0) return;
  a.d_cell_scale[unit] = d_cell_scale;
  a.d_cell_bias[unit] = d_cell_bias;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) a.d_recurrent_scale[gate * H + unit] = d_scale[gate];
}

// ---- Launches.

using Kernel = void (*)(Arguments);

// The launch parameters of a kernel.
struct Plan {
  Kernel kernel = nullptr;
  int blocks = 0, threads = 0;
  size_t memory = 0;              // shared memory of a block
  bool fits = false;              // all blocks are resident on the device at once
  const char* problem = nullptr;  // the error of CUDA, if it could not tell whether they fit
};

#ifdef __CUDACC__
using Stream = cudaStream_t;

void check_on_device(Plan* plan) {
  int device, memory, processors, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && plan->memory <= static_cast<size_t>(memory)) {
    error = cudaFuncSetAttribute(plan->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 plan->memory);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, plan->kernel,
                                                            plan->threads, plan->memory);
  }
  if (error == cudaSuccess)
    plan->fits = plan->blocks <= processors * resident;
  else
    plan->problem = cudaGetErrorString(error);
}

ffi::Error run(const Plan& plan, Arguments arguments, Stream stream) {
  cudaError_t error = cudaMemsetAsync(arguments.arrived, 0, sizeof(unsigned), stream);
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments};
    error = cudaLaunchCooperativeKernel(plan.kernel, dim3(plan.blocks), dim3(plan.threads),
                                        pointers, plan.memory, stream);
  }
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("cannot run the recurrence: ") +
                              cudaGetErrorString(error));
}
#else
using Stream = void*;

// Assumes one block per multiprocessor; a real device may hold more.
void check_on_device(Plan* plan) {
  plan->fits = plan->blocks <= emulation::device.processors &&
               plan->memory <= emulation::device.shared_memory;
}

ffi::Error run(const Plan& plan, Arguments arguments, Stream) {
  *arguments.arrived = 0;
  emulation::run(plan.blocks, plan.threads, plan.memory, [&] { plan.kernel(arguments); });
  return ffi::Error::Success();
}
#endif

template <typename T, int U, int B>
Plan plan_of(int units, bool is_forward) {
  Plan plan;
  plan.kernel = is_forward ? forward<T, U, B> : backward<T, U, B>;
  plan.blocks = (units + U - 1) / U;
  plan.threads = Sharing<U, B>::kThreads;
  plan.memory = is_forward ? Shared<T, 4 * U, 1, U, B>::bytes(units)
                           : Shared<T, U, 4, U, B>::bytes(4 * units);
  check_on_device(&plan);
  return plan;
}

template <typename T, int U>
Plan plan_of(int batch, int units, bool is_forward) {
  switch (batch) {
    case 32:
      return plan_of<T, U, 32>(units, is_forward);
    case 64:
      return plan_of<T, U, 64>(units, is_forward);
    case 128:
      return plan_of<T, U, 128>(units, is_forward);
    default:
      return {};
  }
}

// Takes the fewest units per block that fit, so that more multiprocessors share the work.
template <typename T>
Plan plan_of(int64_t units_of_block, int batch, int units, bool is_forward) {
  Plan plan;
  for (int U : {2, 4, 8}) {
    if (plan.fits || (units_of_block && units_of_block != U)) continue;
    plan = U == 2   ? plan_of<T, 2>(batch, units, is_forward)
           : U == 4 ? plan_of<T, 4>(batch, units, is_forward)
                    : plan_of<T, 8>(batch, units, is_forward);
  }
  return plan;
}

Plan plan_of(bool in_bfloat16, int64_t units_of_block, int batch, int units, bool is_forward) {
  return in_bfloat16 ? plan_of<bfloat16>(units_of_block, batch, units, is_forward)
                     : plan_of<float>(units_of_block, batch, units, is_forward);
}

// Held from setting a kernel's size of shared memory to its launch: the size is set per kernel, not
// per launch.
std::mutex launching;

ffi::Error launch(const Arguments& a, ffi::DataType dtype, int batch, int64_t units_of_block,
                  bool is_forward, Stream stream) {
  const std::lock_guard<std::mutex> lock(launching);
  const Plan plan = plan_of(dtype == ffi::BF16, units_of_block, batch, a.units, is_forward);
  if (plan.fits) return run(plan, a, stream);
  if (plan.problem)
    return ffi::Error::Internal(std::string("cannot run the recurrence: ") + plan.problem);
  return ffi::Error::InvalidArgument("the CUDA kernel does not fit on this device");
}

#ifdef __CUDACC__
#define STREAM Stream stream,
#define BIND ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()
#else
#define STREAM
#define BIND ffi::Ffi::Bind()
constexpr Stream stream = nullptr;
#endif

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Floats>;

Arguments arguments_of(ffi::AnyBuffer kernel, Floats pre_activation, ffi::Buffer<ffi::U8> flags,
                       Floats recurrent_scale, Floats cell_scale, Floats cell_bias,
                       Floats first_cell, Floats first_hidden) {
  Arguments a = {};
  a.steps = pre_activation.dimensions()[0];
  a.units = kernel.dimensions()[0];
  a.kernel = kernel.untyped_data();
  a.pre_activation = pre_activation.typed_data();
  a.flags = flags.typed_data();
  a.recurrent_scale = recurrent_scale.typed_data();
  a.cell_scale = cell_scale.typed_data();
  a.cell_bias = cell_bias.typed_data();
  a.first_cell = first_cell.typed_data();
  a.first_hidden = first_hidden.typed_data();
  return a;
}

ffi::Error forward_call(STREAM ffi::AnyBuffer kernel, Floats pre_activation,
                        ffi::Buffer<ffi::U8> flags, Floats recurrent_scale, Floats cell_scale,
                        Floats cell_bias, Floats first_cell, Floats first_hidden,
                        Floats recurrent_statistics, Floats cell_statistics, Result hidden,
                        Result cell, Result recurrent_term, Result recurrent_statistics_out,
                        Result cell_statistics_out, ffi::Result<ffi::AnyBuffer> exchange,
                        ffi::Result<ffi::Buffer<ffi::U32>> arrived, bool normalize_recurrent,
                        bool normalize_cell, bool given, bool keep, float epsilon,
                        int64_t units_of_block) {
  Arguments a = arguments_of(kernel, pre_activation, flags, recurrent_scale, cell_scale, cell_bias,
                             first_cell, first_hidden);
  a.normalize_recurrent = normalize_recurrent;
  a.normalize_cell = normalize_cell;
  a.given = given;
  a.keep = keep;
  a.epsilon = epsilon;
  a.recurrent_statistics =
      given ? recurrent_statistics.typed_data() : recurrent_statistics_out->typed_data();
  a.cell_statistics = given ? cell_statistics.typed_data() : cell_statistics_out->typed_data();
  a.hidden = hidden->typed_data();
  a.cell = cell->typed_data();
  a.recurrent_term = recurrent_term->typed_data();
  a.exchange = exchange->untyped_data();
  a.arrived = arrived->typed_data();
  return launch(a, kernel.element_type(), pre_activation.dimensions()[2], units_of_block, true,
                stream);
}

ffi::Error backward_call(STREAM ffi::AnyBuffer kernel, Floats pre_activation,
                         ffi::Buffer<ffi::U8> flags, Floats recurrent_scale, Floats cell_scale,
                         Floats cell_bias, Floats first_cell, Floats first_hidden,
                         Floats recurrent_statistics, Floats cell_statistics, Floats cell,
                         Floats recurrent_term, Floats d_hidden, Floats d_last_cell,
                         Result d_pre_activation, Result d_recurrent_term, Result d_recurrent_scale,
                         Result d_cell_scale, Result d_cell_bias, Result d_first_cell,
                         Result d_first_hidden, ffi::Result<ffi::AnyBuffer> exchange,
                         ffi::Result<ffi::Buffer<ffi::U32>> arrived, bool normalize_recurrent,
                         bool normalize_cell, bool given, float epsilon, int64_t units_of_block) {
  Arguments a = arguments_of(kernel, pre_activation, flags, recurrent_scale, cell_scale, cell_bias,
                             first_cell, first_hidden);
  a.normalize_recurrent = normalize_recurrent;
  a.normalize_cell = normalize_cell;
  a.given = given;
  a.epsilon = epsilon;
  a.recurrent_statistics = recurrent_statistics.typed_data();
  a.cell_statistics = cell_statistics.typed_data();
  a.cell = cell.typed_data();
  a.recurrent_term = recurrent_term.typed_data();
  a.d_hidden = d_hidden.typed_data();
  a.d_last_cell = d_last_cell.typed_data();
  a.d_pre_activation = d_pre_activation->typed_data();
  a.d_recurrent_term = d_recurrent_term->typed_data();
  a.d_recurrent_scale = d_recurrent_scale->typed_data();
  a.d_cell_scale = d_cell_scale->typed_data();
  a.d_cell_bias = d_cell_bias->typed_data();
  a.d_first_cell = d_first_cell->typed_data();
  a.d_first_hidden = d_first_hidden->typed_data();
  a.exchange = exchange->untyped_data();
  a.arrived = arrived->typed_data();
  return launch(a, kernel.element_type(), pre_activation.dimensions()[2], units_of_block, false,
                stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BnlstmForward, forward_call,
                              BIND.Arg<ffi::AnyBuffer>()  // kernel
                                  .Arg<Floats>()          // pre-activation
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // scales, cell's bias
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // first state
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // statistics, if given
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()  // hidden, cell, recurrent term
                                  .Ret<Floats>()
                                  .Ret<Floats>()  // statistics, if not given
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<bool>("normalize_recurrent")
                                  .Attr<bool>("normalize_cell")
                                  .Attr<bool>("given")
                                  .Attr<bool>("keep")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("units_of_block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(BnlstmBackward, backward_call,
                              BIND.Arg<ffi::AnyBuffer>()  // kernel
                                  .Arg<Floats>()          // pre-activation
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // scales, cell's bias
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // first state
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // statistics
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // cell, recurrent term
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // gradients of hidden states, last cell
                                  .Ret<Floats>()
                                  .Ret<Floats>()  // of pre-activation, recurrent term
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()  // of scales, cell's bias
                                  .Ret<Floats>()
                                  .Ret<Floats>()  // of first state
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<bool>("normalize_recurrent")
                                  .Attr<bool>("normalize_cell")
                                  .Attr<bool>("given")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("units_of_block"));

// Null if both passes fit on the device, for a padded batch. Otherwise the error of CUDA, or "" if
// a pass does not fit.
extern "C" const char* BnlstmProblem(int units, int batch, int in_bfloat16) {
  const std::lock_guard<std::mutex> lock(launching);
  for (bool is_forward : {true, false}) {
    const Plan plan = plan_of(in_bfloat16, 0, batch, units, is_forward);
    if (!plan.fits) return plan.problem ? plan.problem : "";
  }
  return nullptr;
}

#ifndef __CUDACC__
// Emulates another device from now on.
extern "C" void BnlstmEmulate(int processors, int shared_memory) {
  emulation::device = {processors, static_cast<size_t>(shared_memory)};
}
#endif
