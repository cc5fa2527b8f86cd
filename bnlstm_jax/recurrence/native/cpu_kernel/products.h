// Products of matrices, of which one is multiplied by a vector of the other's row at a time.
//
//   C [M, N] (+)= A [M, K] X [K, N]
//
// X is in panels: of up to kPanel vectors of columns, [K, columns of the panel], so that a panel's
// rows follow each other in memory. A is packed, in tiles of up to kTile rows, [K, rows of the
// tile], or is in rows. Sums are over K in its order, whatever the shapes of tiles: an element has
// the same bits wherever it is computed.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int kTile = 6;                          // rows of a tile
constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors of a panel: a tile's sums are registers
constexpr int kCached = 1 << 16;  // floats of X that stay in the second cache
constexpr int kLeastBlock = 256;  // rows of X
constexpr int kAhead = 128;       // columns of a tile of A that are fetched before they are due

// How so many vectors of columns are shared between panels.
struct Panels {
  int vectors, count;

  explicit Panels(int vectors) : vectors(vectors), count((vectors + kPanel - 1) / kPanel) {}
  // The first vector of a panel.
  int start(int panel) const { return static_cast<int64_t>(vectors) * panel / count; }
  int size(int panel) const { return start(panel + 1) - start(panel); }
};

// A matrix X.
struct PanelMatrix {
  float* data;
  Panels panels;
  size_t rows;

  size_t size() const { return rows * panels.vectors * kLanes; }
  float* panel(int p) const { return data + rows * panels.start(p) * kLanes; }
  // Writes a row, of which `vector_at(i)` are the elements from column i on.
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

// A matrix A. Packed or not, row m of tiles starts at data + m * stride.
struct LeftMatrix {
  const float* data;
  size_t stride;
  bool packed;
};

// Packs a matrix [rows, K] of which `element(row, k)` is an element.
template <typename Element>
void pack(float* to, int64_t rows, int64_t K, const Element& element) {
  constexpr int64_t kBlock = 32;  // columns, whose cache lines stay while all rows pass
  for (int64_t start = 0; start < K; start += kBlock)
    for (int64_t m = 0; m < rows; m += kTile) {
      const int64_t tile = std::min<int64_t>(kTile, rows - m), end = std::min(start + kBlock, K);
      float* at = to + m * K + start * tile;
      for (int64_t k = start; k < end; ++k)
        for (int64_t r = 0; r < tile; ++r) *at++ = element(m + r, k);
    }
}

// What the sums of a tile begin from, or are added to: C.
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

// C, whose rows of whole vectors are `stride` apart. All of a block of rows of X stays in the cache
// while a tile of A passes, so that A is read once. If such blocks were short, one panel of it
// stays while all of A passes.
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
