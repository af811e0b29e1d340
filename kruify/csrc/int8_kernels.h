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

// x (n,) -> q = round(x / scale) + kShift, scale = max |x| / 127. Where x is not finite, scale is NaN and so is every
// product.
inline float quantise(int64_t n, const float* x, int8_t* q) {
  Ints most{};  // of magnitudes as integers, which are in the same order; NaN and infinity are above all others
  for_vectors<float>(n, [&](int64_t i, auto get, auto) __attribute__((always_inline)) {
    const Ints bits = (Ints)get(x + i) & 0x7fffffff;
    most = most > bits ? most : bits;
  });
  const int32_t bits = largest(most);
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof bits);
  const float inverse = magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
  // The sum with 1.5 * 2^23 has the rounded number for its last bits.
  const Vec<float> magic = splat<float>(12582912.0f + float(kShift));
  for_vectors<float>(n, [&](int64_t i, auto get, auto) __attribute__((always_inline)) {
    store_bytes(q + i, (Ints)(get(x + i) * inverse + magic));
  });
  return bits < 0x7f800000 ? magnitude / 127.0f : __builtin_nanf("");
}

// Rounded vectors, what their products are added to (null: nothing; y itself or one vector for all of them), and where
// they go; each with the distance from one vector to the next.
struct Vectors {
  const int8_t* q;
  int64_t qs;
  const float *scales, *base;
  int64_t bs;
  float* y;
  int64_t ys;

  KRUIFY_INLINE Vectors from(int64_t s) const {
    return {q + s * qs, qs, scales + s, base + s * bs, bs, y + s * ys, ys};
  }
};

// y = base + W x for P panels and S vectors.
template <bool Base, int P, int S> KRUIFY_INLINE void tile(const Int8Panels& w, int64_t panel, const Vectors& v) {
  Ints sums[P][S];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sums[p][s] = *reinterpret_cast<const LooseInts*>(w.start + (panel + p) * kLanes);
  const int8_t* from = w.weights + panel * w.groups * 4 * kLanes;
  for (int64_t k = 0; k < w.groups; ++k) {
    Activations x[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) x[s] = activations(v.q + s * v.qs + 4 * k);
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
      const Vec<float> sum = __builtin_convertvector(sums[p][s], Vec<float>) * (load(w.scale + row) * v.scales[s]);
      const float* base = v.base + s * v.bs + row;
      float* to = v.y + s * v.ys + row;
      if (lanes == kLanes) store(to, Base ? load(base) + sum : sum);
      else store_n(to, Base ? load_n(base, lanes) + sum : sum, lanes);
    }
  }
}

template <bool Base, int P, int S>
KRUIFY_INLINE int64_t panels(const Int8Panels& w, int64_t panel, int64_t end, int64_t count, const Vectors& v) {
  for (; panel + P <= end; panel += P) {
    int64_t s = 0;
    for (; s + S <= count; s += S) tile<Base, P, S>(w, panel, v.from(s));
    if constexpr (S > 1)
      for (; s < count; ++s) tile<Base, P, 1>(w, panel, v.from(s));
  }
  return panel;
}

// The last panels of a single vector, up to P, all at once: each sum alone waits for every product before the next.
template <bool Base, int P>
KRUIFY_INLINE void last_panels(const Int8Panels& w, int64_t panel, int64_t end, const Vectors& v) {
  if (end - panel == P) tile<Base, P, 1>(w, panel, v);
  else if constexpr (P > 1) last_panels<Base, P - 1>(w, panel, end, v);
}

template <bool Base> inline void product(const Int8Panels& w, int64_t count, const Vectors& v) {
  const int64_t end = (w.rows + kLanes - 1) / kLanes;
  if (count == 1) {
    const int64_t done = panels<Base, kTallPanels, 1>(w, 0, end, count, v);
    return last_panels<Base, kTallPanels - 1>(w, done, end, v);
  }
  const int64_t done = panels<Base, kPanelsTogether, kVectorsTogether>(w, 0, end, count, v);
  panels<Base, 1, kVectorsTogether>(w, done, end, count, v);
}

inline void multiply(const Int8Matrix& m, int64_t count, const float* x, int64_t xs, const float* constant,
    float* const* y, int64_t ys, float* scratch) {
  const int64_t qs = round_up(m.cols > m.rank ? m.cols : m.rank, 64), zs = round_up(m.rank, 16);
  float *scales = scratch, *z = scales + round_up(count, 16);
  int8_t* q = reinterpret_cast<int8_t*>(z + count * zs);
  for (int64_t s = 0; s < count; ++s) scales[s] = quantise(m.cols, x + s * xs, q + s * qs);
  if (m.rank) {
    product<false>(m.v, count, {q, qs, scales, nullptr, 0, z, zs});
    for (int64_t s = 0; s < count; ++s) scales[s] = quantise(m.rank, z + s * zs, q + s * qs);
  }
  for (int g = 0; g < m.gates; ++g) {
    const float* base = constant ? constant + g * m.rows : y[g];
    product<true>(m.u[g], count, {q + m.u[g].first, qs, scales, base, constant ? 0 : ys, y[g], ys});
  }
}

const Int8Kernels& int8_kernels() {
  static constexpr Int8Kernels table{.lanes = kLanes, .shift = kShift, .multiply = multiply};
  return table;
}

}  // namespace kruify::KRUIFY_ISA
