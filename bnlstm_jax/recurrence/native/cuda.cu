// The recurrence of an LSTM over all time steps in one kernel, forward and one backward, with batch
// normalisation of the recurrent term and of the cell: equations 6 to 8 of "Recurrent Batch
// Normalization". bnlstm_jax/cuda_gpu.py builds and calls it, and says what the arguments are.
//
// A block of threads owns a few hidden units for the whole batch and for all steps. Its columns of
// the recurrent kernel stay in shared memory, its units' statistics are sums within a warp, and
// their cells stay in registers. What blocks exchange at a step is the hidden state (backward: the
// gradient of the recurrent term), through the L2 cache, with one barrier of all blocks.
//
// Arrays are [time, features, batch]: lanes of a warp are rows of the batch, next to each other.
// The batch is padded to 32, 64 or 128 rows with such as have no flag.
//
// Compiled by a C++ compiler it includes emulation.h in CUDA's place, and runs on a CPU.

#include <algorithm>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define HOST_DEVICE_METHOD __host__ __device__
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
#endif

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kMaxStages = 8;
constexpr unsigned kLanes = 0xffffffffu;

// What a row of the batch is at a step: not past its end, counted in the statistics of the terms.
enum Flag : uint8_t { kValid = 1, kInRecurrent = 2, kInCell = 4 };

struct Arguments {
  int steps, batch, units;  // batch: padded
  int stages;               // chunks of the operand in shared memory
  bool normalize_recurrent, normalize_cell;
  bool given;  // statistics are given; else they are the batch's, and put out
  bool keep;   // put out what the backward pass needs
  float epsilon;
  const void* kernel;           // [H, 4H]
  const float* pre_activation;  // [T, 4H, B], of input and bias
  const uint8_t* flags;         // [T, B], of rows: kValid, kInRecurrent, kInCell
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
  // Gradients by outputs, and those to be found.
  const float* by_hidden;       // [T, H, B]
  const float* by_last_cell;    // [H, B]; by_hidden has the last hidden state's
  float* by_pre_activation;     // [T, 4H, B]
  float* by_recurrent_term;     // [T, 4H, B]
  float* by_recurrent_scale;    // [4H]
  float* by_cell_scale;         // [H]
  float* by_cell_bias;          // [H]
  float* by_first_cell;         // [H, B]
  float* by_first_hidden;       // [H, B]
  // What is exchanged, twice: [2, H, B] forward, [2, 4H, B] backward; and a counter.
  void* exchange;
  unsigned* arrived;
};

// ---- Sums over the batch. A lane has the rows lane + 32 r.

DEVICE float warp_sum(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kLanes, x, distance);
  return x;
}

template <int R>
struct Rows {
  bool counts[R], is_first[R];  // of those that count
  float count;                  // at least one
  int first;                    // which it is; beyond the batch if none counts
};

template <int R>
DEVICE Rows<R> rows_with(Flag flag, const uint8_t (&flags)[R], int lane) {
  Rows<R> rows;
  float count = 0;
  int first = kWarp * R;
#pragma unroll
  for (int r = R - 1; r >= 0; --r) {
    rows.counts[r] = flags[r] & flag;
    if (rows.counts[r]) {
      count += 1;
      first = lane + kWarp * r;
    }
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kLanes, first, distance);
    first = other < first ? other : first;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) rows.is_first[r] = first == lane + kWarp * r;
  rows.count = fmaxf(warp_sum(count), 1.f);
  rows.first = first;
  return rows;
}

struct Moments {
  float mean, inverse;  // 1 / sqrt(variance + epsilon)
};

// Of the batch, measured from the first row that counts: so that the mean of equal rows is each of
// them. Both are zero if no row counts.
template <int R>
DEVICE Moments moments_of(const float (&x)[R], const Rows<R>& rows, float epsilon, float* variance) {
  float origin = 0;
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (rows.is_first[r]) origin = x[r];
  origin = __shfl_sync(kLanes, origin, rows.first % kWarp);
  float sum = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) sum += rows.counts[r] ? x[r] - origin : 0.f;
  float mean = origin + warp_sum(sum) / rows.count;
  float squares = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) squares += rows.counts[r] ? (x[r] - mean) * (x[r] - mean) : 0.f;
  *variance = warp_sum(squares) / rows.count;
  return {mean, rsqrtf(*variance + epsilon)};
}

// Moments as `statistics` [2, F] has them, or the batch's, which are put there.
template <int R>
DEVICE Moments moments_at(const float (&x)[R], const Rows<R>& rows, const Arguments& a,
                          float* statistics, int size, int feature, bool known, int lane) {
  if (known)
    return {statistics[feature], rsqrtf(statistics[size + feature] + a.epsilon)};
  float variance;
  const Moments moments = moments_of(x, rows, a.epsilon, &variance);
  if (lane == 0) {
    statistics[feature] = moments.mean;
    statistics[size + feature] = variance;
  }
  return moments;
}

// The gradient by x of scale * (x - mean) * inverse, in place of that by the result, which is zero
// for rows that do not count.
// Returns the sum for the scale's own gradient.
template <int R>
DEVICE float normalize_backward(float (&by)[R], const float (&x)[R], const Moments& moments,
                                float scale, const Rows<R>& rows, bool given) {
  float sum = 0, by_inverse = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sum += by[r];
    by_inverse += by[r] * (x[r] - moments.mean);
  }
  float by_scale = moments.inverse * warp_sum(by_inverse);
  sum = given ? 0.f : warp_sum(sum) / rows.count;
  float slope = given ? 0.f : moments.inverse * by_scale / rows.count;
#pragma unroll
  for (int r = 0; r < R; ++r)
    by[r] = rows.counts[r]
                ? scale * moments.inverse * (by[r] - sum - (x[r] - moments.mean) * slope)
                : 0.f;
  return by_scale;
}

// ---- Products of the block's columns of the kernel with what blocks exchange.

// How warps share the C columns: each has kColumns of them, and one of kParts parts of every chunk
// of kChunk rows of the operand, which are fetched together.
template <typename T, int C>
struct Shares {
  static constexpr int kChunk = sizeof(T) == 4 ? 32 : 128;
  static constexpr int kColumns = C < 8 ? C : 8;
  static constexpr int kGroups = C / kColumns;
  static constexpr int kParts = kWarps / kGroups;
  static_assert(kGroups * kColumns == C && kGroups * kParts == kWarps, "columns by warps");
};

// Elements from a row of an operand in shared memory to the next. The tensor cores' loads take eight
// rows at once, which are not to lie in the same banks.
template <typename T, int R>
constexpr int kPitch = kWarp * R + (sizeof(T) == 2 ? 8 : 0);

// Sums of a warp: N columns of the batch.
template <typename T, int N, int R>
struct Accumulator;

template <int N, int R>
struct Accumulator<float, N, R> {
  float sums[N][R] = {};

  DEVICE_METHOD void add(const float* weights, const float* operand, int rows, int lane) {
    for (int k = 0; k < rows; ++k) {
      float w[N];
#pragma unroll
      for (int n = 0; n < N; n += 4)
        *reinterpret_cast<float4*>(w + n) = *reinterpret_cast<const float4*>(weights + k * N + n);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float x = operand[k * kPitch<float, R> + lane + kWarp * r];
#pragma unroll
        for (int n = 0; n < N; ++n) sums[n][r] = fmaf(w[n], x, sums[n][r]);
      }
    }
  }

  DEVICE_METHOD void store(float* to, int lane) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < R; ++r) to[(n * R + r) * kWarp + lane] = sums[n][r];
  }
};

template <int R>
struct Accumulator<bfloat16, 8, R> {
  using Tile = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 8, 32, 16, float>;
  Tile sums[R];

  DEVICE_METHOD Accumulator() {
#pragma unroll
    for (int r = 0; r < R; ++r) nvcuda::wmma::fill_fragment(sums[r], 0.f);
  }

  DEVICE_METHOD void add(const bfloat16* weights, const bfloat16* operand, int rows, int) {
    using namespace nvcuda;
    constexpr int kRow = kPitch<bfloat16, R>;
    for (int k = 0; k < rows; k += 16) {
      wmma::fragment<wmma::matrix_a, 8, 32, 16, bfloat16, wmma::col_major> w;
      wmma::load_matrix_sync(w, weights + k * 8, 8);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        wmma::fragment<wmma::matrix_b, 8, 32, 16, bfloat16, wmma::row_major> x;
        wmma::load_matrix_sync(x, operand + k * kRow + kWarp * r, kRow);
        wmma::mma_sync(sums[r], w, x, sums[r]);
      }
    }
  }

  DEVICE_METHOD void store(float* to, int) const {
    using namespace nvcuda;
#pragma unroll
    for (int r = 0; r < R; ++r)
      wmma::store_matrix_sync(to + kWarp * r, sums[r], kWarp * R, wmma::mem_row_major);
  }
};

// Shared memory of a block.
template <typename T, int C, int R>
struct Shared {
  using By = Shares<T, C>;
  static constexpr int kBatch = kWarp * R, kRow = kPitch<T, R>, kChunk = By::kChunk;
  T* weights;    // [groups, padded, columns of a group]
  T* ring;       // [stages, kChunk, kRow]
  float* parts;  // [parts, C, B]: the product, in parts to be added
  int rows, padded;

  HOST_DEVICE_METHOD static constexpr int chunks(int rows) { return (rows + kChunk - 1) / kChunk; }
  static constexpr size_t chunk_bytes() { return sizeof(T) * kChunk * kRow; }
  static constexpr size_t fixed_bytes(int rows) {
    return sizeof(T) * C * kChunk * chunks(rows) + sizeof(float) * By::kParts * C * kBatch;
  }

  DEVICE_METHOD Shared(unsigned char* memory, int rows, int stages)
      : rows(rows), padded(chunks(rows) * kChunk) {
    weights = reinterpret_cast<T*>(memory);
    ring = weights + C * padded;
    parts = reinterpret_cast<float*>(ring + stages * kChunk * kRow);
  }

  // Where the weight of a row and a column lies.
  DEVICE_METHOD T& weight(int row, int column) {
    constexpr int kColumns = By::kColumns;
    return weights[(column / kColumns * padded + row) * kColumns + column % kColumns];
  }

  // `operand` [rows, B] in the device's memory, read past the L1 cache: other blocks wrote it.
  DEVICE_METHOD void fetch(const T* operand, int chunk, int stages) {
    constexpr int kVector = 16 / sizeof(T), kVectors = kBatch / kVector;  // of a row
    if (chunk * kChunk < rows) {
      T* to = ring + chunk % stages * kChunk * kRow;
      const T* from = operand + static_cast<size_t>(chunk) * kChunk * kBatch;
      for (int i = threadIdx.x; i < kChunk * kVectors; i += kThreads) {
        const int row = i / kVectors;
        T* place = to + row * kRow + i % kVectors * kVector;
        if (chunk * kChunk + row < rows)
          __pipeline_memcpy_async(place, from + i * kVector, 16);
        else
          *reinterpret_cast<uint4*>(place) = uint4{0, 0, 0, 0};
      }
    }
    __pipeline_commit();
  }

  // All threads of the block; when it returns, they may read `parts`.
  DEVICE_METHOD void multiply(const T* operand, int stages) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int group = warp % By::kGroups, part = warp / By::kGroups;
    constexpr int kRows = kChunk / By::kParts;
    Accumulator<T, By::kColumns, R> sums;
    for (int chunk = 0; chunk < stages; ++chunk) fetch(operand, chunk, stages);
    for (int chunk = 0; chunk * kChunk < rows; ++chunk) {
      wait_for_chunk(stages);
      __syncthreads();
      const int row = chunk * kChunk + part * kRows;
      sums.add(weights + (static_cast<size_t>(group) * padded + row) * By::kColumns,
               ring + (chunk % stages * kChunk + part * kRows) * kRow, kRows, lane);
      __syncthreads();
      fetch(operand, chunk + stages, stages);
    }
    sums.store(parts + (part * C + group * By::kColumns) * kBatch, lane);
    __syncthreads();
  }

  // Until no more than stages - 1 fetches are under way, so that the oldest has come.
  DEVICE_METHOD static void wait_for_chunk(int stages) {
    switch (stages) {
      case 1: __pipeline_wait_prior(0); break;
      case 2: __pipeline_wait_prior(1); break;
      case 3: __pipeline_wait_prior(2); break;
      case 4: __pipeline_wait_prior(3); break;
      case 5: __pipeline_wait_prior(4); break;
      case 6: __pipeline_wait_prior(5); break;
      case 7: __pipeline_wait_prior(6); break;
      default: __pipeline_wait_prior(7); break;
    }
  }

  // What `multiply` came to, of a column.
  DEVICE_METHOD void product(float (&to)[R], int column, int lane) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      to[r] = 0;
#pragma unroll
      for (int part = 0; part < By::kParts; ++part)
        to[r] += parts[(part * C + column) * kBatch + lane + kWarp * r];
    }
  }
};

// A barrier of all blocks, in two halves. What a block wrote before it arrived for the `turn`th time
// can be read by all that have waited for that turn.
DEVICE void arrive(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) increment_release(arrived);
}

DEVICE void wait_for_all(const unsigned* arrived, unsigned turn) {
  if (threadIdx.x == 0)
    while (load_acquire(arrived) < turn * gridDim.x);
  __syncthreads();
}

DEVICE void assign(float& to, float x) { to = x; }
DEVICE void assign(bfloat16& to, float x) { to = __float2bfloat16(x); }

DEVICE float sigmoid(float x) { return 0.5f * tanhf(0.5f * x) + 0.5f; }

// ---- What a step does with the terms of a unit.

template <int R>
struct Gates {
  float f[R], i[R], o[R], g[R];
};

// Rows of one of the features of an array [features, B].
template <typename T, int R>
DEVICE void load(T (&to)[R], const T* from, size_t feature, int lane) {
#pragma unroll
  for (int r = 0; r < R; ++r) to[r] = from[(feature * R + r) * kWarp + lane];
}

template <int R>
DEVICE void store(float* to, size_t feature, int lane, const float (&from)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) to[(feature * R + r) * kWarp + lane] = from[r];
}

template <typename T, int R>
DEVICE void store_operand(T* to, size_t feature, int lane, const float (&from)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) assign(to[(feature * R + r) * kWarp + lane], from[r]);
}

template <int R>
DEVICE Gates<R> gates_of(const float (&terms)[4][R]) {
  Gates<R> gates;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    gates.f[r] = sigmoid(terms[0][r]);
    gates.i[r] = sigmoid(terms[1][r]);
    gates.o[r] = sigmoid(terms[2][r]);
    gates.g[r] = tanhf(terms[3][r]);
  }
  return gates;
}

template <typename T, int U, int R>
__global__ void __launch_bounds__(kThreads, 1) forward(Arguments a) {
  DYNAMIC_SHARED(memory);
  const int H = a.units, B = kWarp * R;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int unit = blockIdx.x * U + warp;
  const bool owner = warp < U && unit < H;  // of a unit; all lanes of a warp alike
  const T* kernel = static_cast<const T*>(a.kernel);
  T* exchange = static_cast<T*>(a.exchange);
  Shared<T, 4 * U, R> shared(memory, H, a.stages);

  for (int i = threadIdx.x; i < shared.padded * 4 * U; i += kThreads) {
    const int row = i / (4 * U), column = i % (4 * U);  // column: 4 unit + gate
    const int of = blockIdx.x * U + column / 4;
    T& weight = shared.weight(row, column);
    if (row < H && of < H)
      weight = kernel[static_cast<size_t>(row) * 4 * H + column % 4 * H + of];
    else
      assign(weight, 0.f);
  }
  float c[R], h[R], scale[4], cell_scale = 1, cell_bias = 0;
  if (owner) {
    load(c, a.first_cell, unit, lane);
    load(h, a.first_hidden, unit, lane);
    store_operand(exchange, unit, lane, h);
    cell_scale = a.cell_scale[unit];
    cell_bias = a.cell_bias[unit];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) scale[gate] = a.recurrent_scale[gate * H + unit];
  }
  arrive(a.arrived);
  wait_for_all(a.arrived, 1);

  for (int t = 0; t < a.steps; ++t) {
    const size_t gates_at = static_cast<size_t>(t) * 4 * H, units_at = static_cast<size_t>(t) * H;
    uint8_t flags[R] = {};
    float terms[4][R];
    if (owner) {  // before the product, during which they come
      load(flags, a.flags, t, lane);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        load(terms[gate], a.pre_activation, gates_at + gate * H + unit, lane);
    }
    shared.multiply(exchange + static_cast<size_t>(t % 2) * H * B, a.stages);
    if (owner) {
      const Rows<R> in_recurrent = rows_with(kInRecurrent, flags, lane);
      const Rows<R> in_cell = rows_with(kInCell, flags, lane);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        float recurrent[R];
        shared.product(recurrent, 4 * warp + gate, lane);
        Moments m = {0, 1};
        if (a.normalize_recurrent)
          m = moments_at(recurrent, in_recurrent, a, a.recurrent_statistics + 2 * gates_at,
                         4 * H, gate * H + unit, a.given, lane);
        const float factor = a.normalize_recurrent ? scale[gate] * m.inverse : 1.f;
#pragma unroll
        for (int r = 0; r < R; ++r) terms[gate][r] += factor * (recurrent[r] - m.mean);
      }
      const Gates<R> gates = gates_of(terms);
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (flags[r] & kValid) c[r] = gates.f[r] * c[r] + gates.i[r] * gates.g[r];
      Moments m = {0, 1};
      if (a.normalize_cell)
        m = moments_at(c, in_cell, a, a.cell_statistics + 2 * units_at, H, unit, a.given, lane);
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (flags[r] & kValid)
          h[r] = gates.o[r] * tanhf(cell_scale * m.inverse * (c[r] - m.mean) + cell_bias);
      store_operand(exchange + static_cast<size_t>((t + 1) % 2) * H * B, unit, lane, h);
    }
    arrive(a.arrived);
    if (owner) {  // what no other block waits for
      store(a.hidden, units_at + unit, lane, h);
      if (a.keep) {
        store(a.cell, units_at + unit, lane, c);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          float recurrent[R];
          shared.product(recurrent, 4 * warp + gate, lane);
          store(a.recurrent_term, gates_at + gate * H + unit, lane, recurrent);
        }
      }
    }
    wait_for_all(a.arrived, t + 2);
  }
  if (!a.keep && owner) store(a.cell, unit, lane, c);  // the last one alone
}

template <typename T, int U, int R>
__global__ void __launch_bounds__(kThreads, 1) backward(Arguments a) {
  DYNAMIC_SHARED(memory);
  const int H = a.units, B = kWarp * R;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int unit = blockIdx.x * U + warp;
  const bool owner = warp < U && unit < H;
  const T* kernel = static_cast<const T*>(a.kernel);
  T* exchange = static_cast<T*>(a.exchange);
  Shared<T, U, R> shared(memory, 4 * H, a.stages);

  for (int i = threadIdx.x; i < shared.padded * U; i += kThreads) {
    const int column = i / shared.padded, row = i % shared.padded;
    const int of = blockIdx.x * U + column;
    T& weight = shared.weight(row, column);
    if (row < 4 * H && of < H)
      weight = kernel[static_cast<size_t>(of) * 4 * H + row];
    else
      assign(weight, 0.f);
  }
  float by_c[R], by_h[R] = {}, scale[4], cell_scale = 1, cell_bias = 0;
  float by_scale[4] = {}, by_cell_scale = 0, by_cell_bias = 0;
  if (owner) {
    load(by_c, a.by_last_cell, unit, lane);
    cell_scale = a.cell_scale[unit];
    cell_bias = a.cell_bias[unit];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) scale[gate] = a.recurrent_scale[gate * H + unit];
  }

  for (int t = a.steps - 1; t >= 0; --t) {
    const size_t gates_at = static_cast<size_t>(t) * 4 * H, units_at = static_cast<size_t>(t) * H;
    T* exchanged = exchange + static_cast<size_t>(t % 2) * 4 * H * B;
    uint8_t flags[R] = {};
    float by_terms[4][R], by_recurrent[4][R];
    if (owner) {
      load(flags, a.flags, t, lane);
      const Rows<R> in_recurrent = rows_with(kInRecurrent, flags, lane);
      const Rows<R> in_cell = rows_with(kInCell, flags, lane);
      // The step once more.
      float recurrent[4][R], terms[4][R], c[R], before[R], by_output[R];
      Moments of[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const int feature = gate * H + unit;
        load(recurrent[gate], a.recurrent_term, gates_at + feature, lane);
        load(terms[gate], a.pre_activation, gates_at + feature, lane);
        of[gate] = {0, 1};
        if (a.normalize_recurrent)
          of[gate] = moments_at(recurrent[gate], in_recurrent, a,
                                a.recurrent_statistics + 2 * gates_at, 4 * H, feature, true, lane);
        const float factor = a.normalize_recurrent ? scale[gate] * of[gate].inverse : 1.f;
#pragma unroll
        for (int r = 0; r < R; ++r)
          terms[gate][r] += factor * (recurrent[gate][r] - of[gate].mean);
      }
      const Gates<R> gates = gates_of(terms);
      load(c, a.cell, units_at + unit, lane);
      if (t > 0)
        load(before, a.cell, units_at - H + unit, lane);
      else
        load(before, a.first_cell, unit, lane);
      load(by_output, a.by_hidden, units_at + unit, lane);
      Moments of_cell = {0, 1};
      if (a.normalize_cell)
        of_cell = moments_at(c, in_cell, a, a.cell_statistics + 2 * units_at, H, unit, true, lane);

      // Its gradient.
      float by_cell_term[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        by_h[r] += by_output[r];
        const float output = tanhf(cell_scale * of_cell.inverse * (c[r] - of_cell.mean) + cell_bias);
        const float by = flags[r] & kValid ? by_h[r] : 0.f;
        by_terms[2][r] = by * output * gates.o[r] * (1 - gates.o[r]);
        by_cell_term[r] = by * gates.o[r] * (1 - output * output);
      }
      float sum = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) sum += by_cell_term[r];
      by_cell_bias += warp_sum(sum);
      if (a.normalize_cell)
        by_cell_scale +=
            normalize_backward(by_cell_term, c, of_cell, cell_scale, in_cell, a.given);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        by_c[r] += by_cell_term[r];
        const float by = flags[r] & kValid ? by_c[r] : 0.f;
        by_terms[0][r] = by * before[r] * gates.f[r] * (1 - gates.f[r]);
        by_terms[1][r] = by * gates.g[r] * gates.i[r] * (1 - gates.i[r]);
        by_terms[3][r] = by * gates.i[r] * (1 - gates.g[r] * gates.g[r]);
        if (flags[r] & kValid) by_c[r] *= gates.f[r];
      }
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
        for (int r = 0; r < R; ++r) by_recurrent[gate][r] = by_terms[gate][r];
        if (a.normalize_recurrent)
          by_scale[gate] += normalize_backward(by_recurrent[gate], recurrent[gate], of[gate],
                                               scale[gate], in_recurrent, a.given);
        store_operand(exchanged, gate * H + unit, lane, by_recurrent[gate]);
      }
    }
    arrive(a.arrived);
    if (owner) {  // what no other block waits for
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const size_t feature = gates_at + gate * H + unit;
        store(a.by_pre_activation, feature, lane, by_terms[gate]);
        store(a.by_recurrent_term, feature, lane, by_recurrent[gate]);
      }
    }
    wait_for_all(a.arrived, a.steps - t);
    shared.multiply(exchanged, a.stages);
    if (owner) {
      float by_product[R];
      shared.product(by_product, warp, lane);
#pragma unroll
      for (int r = 0; r < R; ++r)  // a row that is not valid hands its gradient on
        by_h[r] = (flags[r] & kValid ? 0.f : by_h[r]) + by_product[r];
    }
  }
  if (owner) {
    store(a.by_first_cell, unit, lane, by_c);
    store(a.by_first_hidden, unit, lane, by_h);
    if (lane == 0) {
      a.by_cell_scale[unit] = by_cell_scale;
      a.by_cell_bias[unit] = by_cell_bias;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) a.by_recurrent_scale[gate * H + unit] = by_scale[gate];
    }
  }
}

// ---- Launches.

using Kernel = void (*)(Arguments);

// How a kernel is run.
struct Plan {
  Kernel kernel = nullptr;
  int blocks = 0, stages = 0;
  size_t memory = 0;              // shared memory of a block
  bool fits = false;              // all blocks at once on the device
  const char* problem = nullptr;  // of the device, if it has not told
};

#ifdef __CUDACC__
using Stream = cudaStream_t;

void check_on_device(Plan* plan) {
  int device, processors, resident;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(plan->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 plan->memory);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, plan->kernel, kThreads,
                                                          plan->memory);
  if (error == cudaSuccess)
    plan->fits = plan->blocks <= processors * resident;
  else
    plan->problem = cudaGetErrorString(error);
}

ffi::Error run(const Plan& plan, Arguments arguments, Stream stream) {
  cudaError_t error = cudaMemsetAsync(arguments.arrived, 0, sizeof(unsigned), stream);
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments};
    error = cudaLaunchCooperativeKernel(plan.kernel, dim3(plan.blocks), dim3(kThreads), pointers,
                                        plan.memory, stream);
  }
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("cannot run the recurrence: ") +
                              cudaGetErrorString(error));
}

size_t shared_memory_of_block() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}
#else
using Stream = void*;

void check_on_device(Plan* plan) { plan->fits = plan->blocks <= 132; }  // as on an H200

ffi::Error run(const Plan& plan, Arguments arguments, Stream) {
  *arguments.arrived = 0;
  emulation::run(plan.blocks, kThreads, plan.memory, [&] { plan.kernel(arguments); });
  return ffi::Error::Success();
}

size_t shared_memory_of_block() { return 227 * 1024; }
#endif

// With as much of the operand under way as there is room for, at least two chunks of several.
template <typename T, int U, int R>
Plan plan_of(int units, bool is_forward) {
  using F = Shared<T, 4 * U, R>;
  using B = Shared<T, U, R>;
  const int rows = is_forward ? units : 4 * units, chunks = B::chunks(rows);
  const size_t fixed = is_forward ? F::fixed_bytes(rows) : B::fixed_bytes(rows);
  const size_t limit = shared_memory_of_block(), chunk = B::chunk_bytes();
  Plan plan;
  plan.kernel = is_forward ? forward<T, U, R> : backward<T, U, R>;
  plan.blocks = (units + U - 1) / U;
  if (fixed + std::min(chunks, 2) * chunk > limit) return plan;
  plan.stages = std::min({kMaxStages, chunks, static_cast<int>((limit - fixed) / chunk)});
  plan.memory = fixed + plan.stages * chunk;
  check_on_device(&plan);
  return plan;
}

template <typename T, int U>
Plan plan_of(int batch, int units, bool is_forward) {
  switch (batch) {
    case 32: return plan_of<T, U, 1>(units, is_forward);
    case 64: return plan_of<T, U, 2>(units, is_forward);
    case 128: return plan_of<T, U, 4>(units, is_forward);
    default: return {};
  }
}

// With few units a block if that fits, since more multiprocessors then share the work.
Plan plan_of(bool in_bfloat16, int64_t units_of_block, int batch, int units, bool is_forward) {
  if (in_bfloat16) return plan_of<bfloat16, 8>(batch, units, is_forward);
  Plan plan;
  if (units_of_block != 8) plan = plan_of<float, 4>(batch, units, is_forward);
  if (units_of_block != 4 && !plan.fits) plan = plan_of<float, 8>(batch, units, is_forward);
  return plan;
}

ffi::Error launch(Arguments a, ffi::DataType dtype, int64_t units_of_block, bool is_forward,
                  Stream stream) {
  const Plan plan = plan_of(dtype == ffi::BF16, units_of_block, a.batch, a.units, is_forward);
  a.stages = plan.stages;
  if (plan.fits) return run(plan, a, stream);
  if (plan.problem) return ffi::Error::Internal(std::string("no recurrence: ") + plan.problem);
  return ffi::Error::InvalidArgument("the recurrence does not fit on this device");
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
  a.batch = pre_activation.dimensions()[2];
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
  return launch(a, kernel.element_type(), units_of_block, true, stream);
}

ffi::Error backward_call(STREAM ffi::AnyBuffer kernel, Floats pre_activation,
                         ffi::Buffer<ffi::U8> flags, Floats recurrent_scale, Floats cell_scale,
                         Floats cell_bias, Floats first_cell, Floats first_hidden,
                         Floats recurrent_statistics, Floats cell_statistics, Floats cell,
                         Floats recurrent_term, Floats by_hidden, Floats by_last_cell,
                         Result by_pre_activation, Result by_recurrent_term,
                         Result by_recurrent_scale, Result by_cell_scale, Result by_cell_bias,
                         Result by_first_cell, Result by_first_hidden,
                         ffi::Result<ffi::AnyBuffer> exchange,
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
  a.by_hidden = by_hidden.typed_data();
  a.by_last_cell = by_last_cell.typed_data();
  a.by_pre_activation = by_pre_activation->typed_data();
  a.by_recurrent_term = by_recurrent_term->typed_data();
  a.by_recurrent_scale = by_recurrent_scale->typed_data();
  a.by_cell_scale = by_cell_scale->typed_data();
  a.by_cell_bias = by_cell_bias->typed_data();
  a.by_first_cell = by_first_cell->typed_data();
  a.by_first_hidden = by_first_hidden->typed_data();
  a.exchange = exchange->untyped_data();
  a.arrived = arrived->typed_data();
  return launch(a, kernel.element_type(), units_of_block, false, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BnlstmForward, forward_call,
    BIND.Arg<ffi::AnyBuffer>()  // kernel
        .Arg<Floats>()          // pre-activation
        .Arg<ffi::Buffer<ffi::U8>>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // scales, cell's bias
        .Arg<Floats>().Arg<Floats>()                // first state
        .Arg<Floats>().Arg<Floats>()                // statistics, if given
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()  // hidden, cell, recurrent term
        .Ret<Floats>().Ret<Floats>()                // statistics, if not
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::Buffer<ffi::U32>>()
        .Attr<bool>("normalize_recurrent")
        .Attr<bool>("normalize_cell")
        .Attr<bool>("given")
        .Attr<bool>("keep")
        .Attr<float>("epsilon")
        .Attr<int64_t>("units_of_block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BnlstmBackward, backward_call,
    BIND.Arg<ffi::AnyBuffer>()  // kernel
        .Arg<Floats>()          // pre-activation
        .Arg<ffi::Buffer<ffi::U8>>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>()  // scales, cell's bias
        .Arg<Floats>().Arg<Floats>()                // first state
        .Arg<Floats>().Arg<Floats>()                // statistics
        .Arg<Floats>().Arg<Floats>()                // cell, recurrent term
        .Arg<Floats>().Arg<Floats>()                // gradients by hidden state, last cell
        .Ret<Floats>().Ret<Floats>()                // by pre-activation, recurrent term
        .Ret<Floats>().Ret<Floats>().Ret<Floats>()  // by scales, cell's bias
        .Ret<Floats>().Ret<Floats>()                // by first state
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::Buffer<ffi::U32>>()
        .Attr<bool>("normalize_recurrent")
        .Attr<bool>("normalize_cell")
        .Attr<bool>("given")
        .Attr<float>("epsilon")
        .Attr<int64_t>("units_of_block"));

// Whether both calls fit on the device, for a padded batch.
extern "C" int BnlstmFits(int units, int batch, int in_bfloat16) {
  return plan_of(in_bfloat16, 0, batch, units, true).fits &&
         plan_of(in_bfloat16, 0, batch, units, false).fits;
}
