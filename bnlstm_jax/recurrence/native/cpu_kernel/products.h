// Matrix products. An element of A is broadcast and multiplied by a vector of a row of X.
//
//   C [M, N] (+)= A [M, K] X [K, N]
//
// X is stored in contiguous panels of up to kPanel vectors of columns, [K, columns of the panel]. A
// is packed, in tiles of up to kTile rows, [K, rows of the tile], or row-major. Sums run over K in
// order, whatever the shapes of tiles, so that an element has the same bits in any tile.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int kTile = 6;                          // rows of a tile
constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors of a panel; tile sums fit in registers
constexpr int kCached = 1 << 16;  // floats of X that stay in the L2 cache
constexpr int kLeastBlock = 256;  // fewest rows of X in a block of all panels
constexpr int kAhead = 128;       // prefetch distance, in columns of a tile of A

// Divides vectors of columns evenly between panels.
struct Panels {
  int vectors, count;

  explicit Panels(int vectors) : vectors(vectors), count((vectors + kPanel - 1) / kPanel) {}
  // The first vector of a panel.
  int start(int panel) const { return static_cast<int64_t>(vectors) * panel / count; }
  int size(int panel) const { return start(panel + 1) - start(panel); }
};

// A right operand X.
struct PanelMatrix {
  float* data;
  Panels panels;
  size_t rows;

  size_t size() const { return rows * panels.vectors * kLanes; }
  float* panel(int p) const { return data + rows * panels.start(p) * kLanes; }
  // Writes row k. `vector_at(i)` returns the vector of elements that starts at column i.
  template <typename VectorAt>
  INLINE void compute_row(size_t k, const VectorAt& vector_at) const {
    for (int p = 0; p < panels.count; ++p) {
      const int start = panels.start(p) * kLanes, size = panels.size(p) * kLanes;
      float* to = panel(p) + k * size;
      for (int i = 0; i < size; i += kLanes) store(to + i, vector_at(start + i));
    }
  }
  void read_row(size_t k, float* row) const {
    for (int p = 0; p < panels.count; ++p) {
      const int start = panels.start(p) * kLanes, size = panels.size(p) * kLanes;
      for (int i = 0; i < size; i += kLanes) store(row + start + i, load(panel(p) + k * size + i));
    }
  }
  INLINE void write_row(size_t k, const float* row) const {
    compute_row(k, [&](int i) { return load(row + i); });
  }
};

// A left operand A. Packed or not, the tile whose first row is m starts at data + m * stride.
struct LeftMatrix {
  const float* data;
  size_t stride;
  bool packed;
};

// Packs the matrix [rows, K] of elements `element(row, k)`.
template <typename Element>
void pack(float* to, int64_t rows, int64_t K, const Element& element) {
  constexpr int64_t kBlock = 32;  // columns whose cache lines stay during the loop over rows
  for (int64_t start = 0; start < K; start += kBlock)
    for (int64_t m = 0; m < rows; m += kTile) {
      const int64_t tile = std::min<int64_t>(kTile, rows - m), end = std::min(start + kBlock, K);
      float* at = to + m * K + start * tile;
      for (int64_t k = start; k < end; ++k)
        for (int64_t r = 0; r < tile; ++r) *at++ = element(m + r, k);
    }
}

// How a tile's sums use C: they overwrite it, start from it, or are added to it at the end.
enum class With { kNothing, kSumsSoFar, kAdded };

template <int Rows, int Vectors>
void multiply_tile(const float* a, size_t row, size_t k, const float* x, int K, float* c,
                   size_t stride, With with) {
  const bool add = with == With::kAdded;
  Vector sums[Rows][Vectors] = {};
  if (with == With::kSumsSoFar) {
    UNROLL for (int r = 0; r < Rows; ++r)
      UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = load(c + r * stride + v * kLanes);
  }
  if (add) {
    UNROLL for (int r = 0; r < Rows; ++r)
      UNROLL for (int v = 0; v < Vectors; ++v) __builtin_prefetch(c + r * stride + v * kLanes, 1);
  }
#pragma GCC unroll 2
  for (int i = 0; i < K; ++i) {
    __builtin_prefetch(a + (i + kAhead) * k);
    Vector b[Vectors];
    UNROLL for (int v = 0; v < Vectors; ++v) b[v] = load(x + (i * Vectors + v) * kLanes);
    UNROLL for (int r = 0; r < Rows; ++r) {
      const Vector w = broadcast(a[r * row + i * k]);
      UNROLL for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add(w, b[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * stride + v * kLanes;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

template <int Vectors, int Rows = kTile>
void multiply_rows(int rows, const float* a, size_t row, size_t k, const float* x, int K, float* c,
                   size_t stride, With with) {
  if (rows == Rows) return multiply_tile<Rows, Vectors>(a, row, k, x, K, c, stride, with);
  if constexpr (Rows > 1) multiply_rows<Vectors, Rows - 1>(rows, a, row, k, x, K, c, stride, with);
}

template <int Vectors = kPanel>
void multiply_panel(int vectors, int rows, const float* a, size_t row, size_t k, const float* x,
                    int K, float* c, size_t stride, With with) {
  if (vectors == Vectors)
    return multiply_rows<Vectors>(rows, a, row, k, x, K, c, stride, with);
  if constexpr (Vectors > 1)
    multiply_panel<Vectors - 1>(vectors, rows, a, row, k, x, K, c, stride, with);
}

// Computes C, whose rows are padded to whole vectors and `stride` apart. A block of rows of X, with
// all panels, stays in the cache for all tiles of A, so that A is read once. If such a block had
// too few rows, a block of a single panel stays in the cache for all of A instead.
inline void multiply(LeftMatrix a, int M, PanelMatrix x, int K, float* c, size_t stride,
                     bool add = false) {
  const auto block_of = [](int vectors) { return kCached / std::max(vectors * kLanes, 1); };
  const bool all_panels = block_of(x.panels.vectors) >= std::min(K, kLeastBlock);
  const int most = block_of(all_panels ? x.panels.vectors : kPanel);
  for (int k = 0; k < K; k += most) {
    const int block = std::min(most, K - k);
    const With with = add ? With::kAdded : k > 0 ? With::kSumsSoFar : With::kNothing;
    const auto tile = [&](int m, int p) {
      const int rows = std::min(kTile, M - m), vectors = x.panels.size(p);
      const float* from = a.data + m * a.stride + k * (a.packed ? rows : 1);
      multiply_panel(vectors, rows, from, a.packed ? 1 : a.stride, a.packed ? rows : 1,
                     x.panel(p) + static_cast<size_t>(k) * vectors * kLanes, block,
                     c + m * stride + x.panels.start(p) * kLanes, stride, with);
    };
    if (all_panels) {
      for (int m = 0; m < M; m += kTile)
        for (int p = 0; p < x.panels.count; ++p) tile(m, p);
    } else {
      for (int p = 0; p < x.panels.count; ++p)
        for (int m = 0; m < M; m += kTile) tile(m, p);
    }
  }
}

}  // namespace
