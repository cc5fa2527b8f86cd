// SIMD vectors as wide as the processor's registers, written with the compiler's vector extensions.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr const char* kInstructionSet = "AVX-512";
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr const char* kInstructionSet = "AVX2";
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr const char* kInstructionSet = "NEON";
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr const char* kInstructionSet = "128-bit vectors";
constexpr int kLanes = 4, kRegisters = 16;
#endif

template <int N>
struct VectorOf {
  typedef float type __attribute__((vector_size(4 * N)));
  typedef int32_t mask __attribute__((vector_size(4 * N)));
};

using Vector = VectorOf<kLanes>::type;
using Mask = VectorOf<kLanes>::mask;  // each lane: all bits set, or none
using Four = VectorOf<4>::type;

// Rounds a number of elements up to whole vectors.
inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// x - 0 equals x for every x, so the compiler removes it. It cannot remove x + 0: -0 + 0 is 0.
INLINE Vector broadcast(float x) { return x - Vector{}; }

// x * y + z, rounded once where the processor has a fused instruction. For AMD's processors, GCC by
// itself fuses in some loops only: the bits of a sum would depend on the shape of its tile.
INLINE Vector multiply_add(Vector x, Vector y, Vector z) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, z);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return vfmaq_f32(z, x, y);
#else
  return x * y + z;
#endif
}

// Aligned loads and stores.
typedef Vector FloatsAsVector __attribute__((may_alias));
INLINE Vector load(const float* from) { return *reinterpret_cast<const FloatsAsVector*>(from); }
INLINE void store(float* to, Vector x) { *reinterpret_cast<FloatsAsVector*>(to) = x; }

// Unaligned loads and stores.
template <typename V = Vector>
INLINE V load_any(const float* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}
template <typename V>
INLINE void store_any(float* to, V x) {
  std::memcpy(to, &x, sizeof(V));
}

// x where the mask is set; elsewhere y, or 0 without a y.
INLINE Vector where(Mask mask, Vector x) { return Vector(Mask(x) & mask); }
INLINE Vector where(Mask mask, Vector x, Vector y) {
  return Vector((Mask(x) & mask) | (Mask(y) & ~mask));
}

// Selects elements by index from the concatenation of x and y.
template <int... I, typename V>
INLINE auto shuffle(V x, V y, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, I...);
#else
  constexpr int n = sizeof(V) / 4;
  float both[2 * n];
  std::memcpy(both, &x, sizeof(V));
  std::memcpy(both + n, &y, sizeof(V));
  typename VectorOf<sizeof...(I)>::type z = {both[I]...};
  return z;
#endif
}

template <int Start, int... I>
std::integer_sequence<int, (Start + I)...> from(std::integer_sequence<int, I...>);
template <int Start, int N>
using Range = decltype(from<Start>(std::make_integer_sequence<int, N>{}));

// Adds the halves of a vector to each other until four elements are left.
template <typename V>
INLINE Four fold(V x) {
  constexpr int n = sizeof(V) / 4;
  if constexpr (n == 4)
    return x;
  else
    return fold(shuffle(x, x, Range<0, n / 2>{}) + shuffle(x, x, Range<n / 2, n / 2>{}));
}

INLINE float total(Vector x) {
  const Four four = fold(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The totals of four vectors.
INLINE Four totals(const Vector (&x)[4]) {
  const Four a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
  using Low = std::integer_sequence<int, 0, 4, 1, 5>;
  using High = std::integer_sequence<int, 2, 6, 3, 7>;
  const Four ab = shuffle(a, b, Low{}) + shuffle(a, b, High{});  // a02 b02 a13 b13
  const Four cd = shuffle(c, d, Low{}) + shuffle(c, d, High{});
  return shuffle(ab, cd, std::integer_sequence<int, 0, 1, 4, 5>{}) +
         shuffle(ab, cd, std::integer_sequence<int, 2, 3, 6, 7>{});
}

// One step of a transposition: swaps the odd blocks of `Size` elements of x with the even blocks
// of y. Returns the new y if `Upper`, else the new x.
template <int Size, bool Upper, int... I>
INLINE Vector exchange(Vector x, Vector y, std::integer_sequence<int, I...>) {
  return shuffle(x, y,
                 std::integer_sequence<int, (I & Size ? kLanes + (Upper ? I : I - Size)
                                                      : (Upper ? I + Size : I))...>{});
}

template <int Size>
INLINE void exchange_blocks(Vector (&rows)[kLanes]) {
  using All = std::make_integer_sequence<int, kLanes>;
  UNROLL for (int i = 0; i < kLanes; ++i) {
    if (i & Size) continue;
    const Vector x = rows[i], y = rows[i + Size];
    rows[i] = exchange<Size, false>(x, y, All{});
    rows[i + Size] = exchange<Size, true>(x, y, All{});
  }
  if constexpr (Size > 1) exchange_blocks<Size / 2>(rows);
}

// Transposes `from` [rows, columns], with rows `stride` apart, into `to` [columns, rows], with rows
// `to_stride` apart. Neither has to be aligned.
inline void transpose(float* to, size_t to_stride, const float* from, size_t stride, int rows,
                      int columns) {
  for (int i = 0; i < rows; i += kLanes)
    for (int j = 0; j < columns; j += kLanes) {
      const float* corner = from + i * stride + j;
      float* target = to + j * to_stride + i;
      if (i + kLanes <= rows && j + kLanes <= columns) {
        Vector block[kLanes];
        UNROLL for (int k = 0; k < kLanes; ++k) block[k] = load_any(corner + k * stride);
        exchange_blocks<kLanes / 2>(block);
        UNROLL for (int k = 0; k < kLanes; ++k) store_any(target + k * to_stride, block[k]);
      } else {
        for (int l = 0; l < kLanes && j + l < columns; ++l)
          for (int k = 0; k < kLanes && i + k < rows; ++k)
            target[l * to_stride + k] = corner[k * stride + l];
      }
    }
}

// Copies n floats. Does not write past them.
INLINE void copy(float* to, const float* from, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_any(to + i, load_any(from + i));
  UNROLL for (int size = kLanes / 2; size > 0; size /= 2)
    if (n & size) {
      std::memcpy(to + i, from + i, 4 * size);
      i += size;
    }
}

// For |x| <= 8, tanh(x) is computed as x P(x^2) / Q(x^2); beyond, as 1 or -1, with an error of at
// most 2.3e-7. The coefficients minimise the relative error, 1e-8. With float32's rounding it is
// below 3.3e-7.
constexpr float kP[] = {0.9999999935732949f, 0.13444499869249102f, 0.0035716002717578184f,
                        2.1894699265299463e-05f, 1.5230470613748452e-08f};
constexpr float kQ[] = {1.f, 0.4677782718969857f, 0.026164451475806344f, 0.000341129570410269f,
                        8.52246798376191e-07f};

// tanh of N vectors at once: their operations are independent and can overlap.
template <int N>
INLINE void tanh(Vector (&x)[N]) {
  Vector u[N], p[N], q[N];
  UNROLL for (int n = 0; n < N; ++n) u[n] = x[n] * x[n];
  UNROLL for (int n = 0; n < N; ++n) p[n] = u[n] * kP[4] + kP[3];
  UNROLL for (int n = 0; n < N; ++n) q[n] = u[n] * kQ[4] + kQ[3];
  UNROLL for (int i = 2; i >= 0; --i) {
    UNROLL for (int n = 0; n < N; ++n) p[n] = p[n] * u[n] + kP[i];
    UNROLL for (int n = 0; n < N; ++n) q[n] = q[n] * u[n] + kQ[i];
  }
  UNROLL for (int n = 0; n < N; ++n) {
    const Mask sign = Mask(x[n]) & std::numeric_limits<int32_t>::min();
    const Vector limit = Vector(Mask(broadcast(1.f)) | sign);
    x[n] = where(u[n] > 64.f, limit, x[n] * p[n] / q[n]);
  }
}

// Replaces the pre-activations of the three gates and the candidate by activations. One tanh
// computes all four: sigmoid(x) = 1/2 + tanh(x / 2) / 2.
INLINE void activate(Vector (&x)[4]) {
  UNROLL for (int n = 0; n < 3; ++n) x[n] *= 0.5f;
  tanh(x);
  UNROLL for (int n = 0; n < 3; ++n) x[n] = x[n] * 0.5f + 0.5f;
}

}  // namespace
