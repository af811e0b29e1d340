// The product with a matrix of eight-bit integers. Vectors are rounded as they come, to 127ths of their largest
// element; sums are integers; what is left in floating point is one multiplication after the other, in files compiled
// without fused multiply-adds: every instruction set gives the same numbers to the last bit.
#pragma once

#include "int8.h"
#include "int8_dot.h"

namespace kruify::KRUIFY_ISA {

constexpr int kLanes = kWidth<float>;
// Panels and vectors whose sums are kept in registers, of one vector and of several.
constexpr int kTallPanels = KRUIFY_VECTOR_BYTES > 16 || KRUIFY_REGISTERS == 32 ? 8 : 2, kPanelsTogether = 4,
              kVectorsTogether = KRUIFY_REGISTERS == 32 ? 4 : 2;

// x (n,) -> q = round(x / scale), scale = max |x| / 127. Where x is not finite, scale is NaN and so is every product.
inline float quantise(int64_t n, const float* x, int8_t* q) {
  using V = Vec<float>;
  typedef int8_t Quarter __attribute__((vector_size(kLanes), aligned(1), may_alias));
  V most{}, faults{};
  for_vectors<float>(n, [&](int64_t i, auto get, auto) __attribute__((always_inline)) {
    const V v = get(x + i);
    most = at_least<float>(most, (V)((Ints)v & 0x7fffffff));
    faults += v * 0.0f;
  });
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  const V magic = splat<float>(12582912.0f);  // 1.5 * 2^23: the sum's last bits are the rounded number
  for_vectors<float>(n, [&](int64_t i, auto get, auto) __attribute__((always_inline)) {
    const Ints rounded = (Ints)(get(x + i) * inverse + magic);
    *reinterpret_cast<Quarter*>(q + i) = (Quarter) __builtin_convertvector(rounded, decltype(Quarter{} + 0));
  });
  return largest / 127.0f + sum<float>(faults);
}

// y = or += W x for P panels and S vectors.
template <bool Add, int P, int S>
KRUIFY_INLINE void tile(
    const Int8Panels& w, int64_t panel, const int8_t* q, int64_t qs, const float* scales, float* y, int64_t ys) {
  Ints sums[P][S];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sums[p][s] = *reinterpret_cast<const LooseInts*>(w.start + (panel + p) * kLanes);
  const int8_t* from = w.weights + panel * w.groups * 4 * kLanes;
  for (int64_t k = 0; k < w.groups; ++k) {
    Activations x[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) x[s] = activations(q + s * qs + 4 * k);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const Bytes weights = load_bytes(from + (p * w.groups + k) * 4 * kLanes);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sums[p][s] = dot(sums[p][s], weights, x[s]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const int64_t row = (panel + p) * kLanes;
    const int lanes = int(min64(kLanes, w.rows - row));
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const Vec<float> v = __builtin_convertvector(sums[p][s], Vec<float>) * (load(w.scale + row) * scales[s]);
      float* to = y + s * ys + row;
      if (lanes == kLanes) store(to, Add ? load(to) + v : v);
      else store_n(to, Add ? load_n(to, lanes) + v : v, lanes);
    }
  }
}

template <bool Add, int P, int S>
KRUIFY_INLINE int64_t panels(const Int8Panels& w, int64_t panel, int64_t end, int64_t count, const int8_t* q,
    int64_t qs, const float* scales, float* y, int64_t ys) {
  for (; panel + P <= end; panel += P) {
    int64_t s = 0;
    for (; s + S <= count; s += S) tile<Add, P, S>(w, panel, q + s * qs, qs, scales + s, y + s * ys, ys);
    if constexpr (S > 1)
      for (; s < count; ++s) tile<Add, P, 1>(w, panel, q + s * qs, qs, scales + s, y + s * ys, ys);
  }
  return panel;
}

template <bool Add>
inline void product(
    const Int8Panels& w, int64_t count, const int8_t* q, int64_t qs, const float* scales, float* y, int64_t ys) {
  const int64_t end = (w.rows + kLanes - 1) / kLanes;
  int64_t done = 0;
  if (count == 1) done = panels<Add, kTallPanels, 1>(w, done, end, count, q, qs, scales, y, ys);
  done = panels<Add, kPanelsTogether, kVectorsTogether>(w, done, end, count, q, qs, scales, y, ys);
  panels<Add, 1, kVectorsTogether>(w, done, end, count, q, qs, scales, y, ys);
}

inline void multiply(
    const Int8Matrix& m, int64_t count, const float* x, int64_t xs, float* const* y, int64_t ys, float* scratch) {
  const int64_t stride = round_up(m.cols > m.rank ? m.cols : m.rank, 64), zs = round_up(m.rank, 16);
  float *scales = scratch, *z = scales + round_up(count, 16);
  int8_t* q = reinterpret_cast<int8_t*>(z + count * zs);
  for (int64_t s = 0; s < count; ++s) scales[s] = quantise(m.cols, x + s * xs, q + s * stride);
  if (m.rank) {
    product<false>(m.v, count, q, stride, scales, z, zs);
    for (int64_t s = 0; s < count; ++s) scales[s] = quantise(m.rank, z + s * zs, q + s * stride);
  }
  for (int g = 0; g < m.gates; ++g) product<true>(m.u[g], count, q + m.u[g].first, stride, scales, y[g], ys);
}

const Int8Kernels& int8_kernels() {
  static constexpr Int8Kernels table{.lanes = kLanes, .shift = kShift, .multiply = multiply};
  return table;
}

}  // namespace kruify::KRUIFY_ISA
