// The arithmetic of one step of LSTM, GRU, RNN and KRU, U vectors of hidden units at a time: each is one long chain of
// dependent operations, and only several side by side fill the pipelines.
#pragma once

#include "simd.h"

namespace kruify::KRUIFY_ISA {

// How many vectors go side by side.
template <class T> constexpr int kTogether = KRUIFY_REGISTERS == 32 ? 2 : 1;

#define KRUIFY_EACH(j, count) _Pragma("GCC unroll 16") for (int j = 0; j < count; ++j)

// exp of N vectors as power * (1 + part), power a power of two.
template <class T, int N> struct Exp {
  Vec<T> power[N], part[N];

  KRUIFY_INLINE Vec<T> plus1(int j) const { return power[j] * part[j] + (power[j] + T(1)); }  // exp(x) + 1
  KRUIFY_INLINE Vec<T> minus1(int j) const {
    return power[j] * part[j] + (power[j] - T(1));
  }  // exp(x) - 1, accurate near 0
};

// exp(scale[j] * x[j]), the argument clamped so that products of three results stay finite. NaN stays NaN.
template <class T, int N> KRUIFY_INLINE Exp<T, N> exponential(const Vec<T> (&x)[N], const T (&scale)[N]) {
  constexpr bool F = sizeof(T) == 4;
  const Vec<T> limit = splat<T>(F ? T(41) : T(330));  // powers of two
  Exp<T, N> r;
  Vec<T> f[N], p[N];  // x * scale / ln 2 = n + f with f in [-1/2, 1/2]; power = 2^n
  KRUIFY_EACH (j, N) f[j] = at_most<T>(limit, x[j] * splat<T>(scale[j] * T(1.44269504088896340736)));
#if defined(__AVX512F__)
  if constexpr (F) {
    KRUIFY_EACH (j, N) p[j] = (Vec<T>)_mm512_roundscale_ps((__m512)f[j], 8);
    KRUIFY_EACH (j, N) r.power[j] = (Vec<T>)_mm512_scalef_ps((__m512)splat<T>(1), (__m512)p[j]);
    KRUIFY_EACH (j, N) f[j] = (Vec<T>)_mm512_reduce_ps((__m512)f[j], 8);
  } else {
    KRUIFY_EACH (j, N) p[j] = (Vec<T>)_mm512_roundscale_pd((__m512d)f[j], 8);
    KRUIFY_EACH (j, N) r.power[j] = (Vec<T>)_mm512_scalef_pd((__m512d)splat<T>(1), (__m512d)p[j]);
    KRUIFY_EACH (j, N) f[j] = (Vec<T>)_mm512_reduce_pd((__m512d)f[j], 8);
  }
#else
  using I = typename Simd<T>::I;
  const Vec<T> magic = splat<T>(F ? T(12582912) : T(6755399441055744.0));  // 1.5 * 2^(mantissa bits)
  KRUIFY_EACH (j, N) f[j] = at_least<T>(-limit, f[j]);
  KRUIFY_EACH (j, N) p[j] = f[j] + magic;
  KRUIFY_EACH (j, N) f[j] -= p[j] - magic;
  KRUIFY_EACH (j, N) r.power[j] = (Vec<T>)(((I)p[j] - (I)magic + (F ? 127 : 1023)) << (F ? 23 : 52));
#endif
  if constexpr (F) {  // Cephes exp2f
    KRUIFY_EACH (j, N) p[j] = 1.535336188319500e-4f * f[j] + 1.339887440266574e-3f;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 9.618437357674640e-3f;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 5.550332471162809e-2f;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 2.402264791363012e-1f;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 6.931472028550421e-1f;
  } else {  // Taylor, ln2^k / k!
    KRUIFY_EACH (j, N) p[j] = 1.3691488853904128880892e-12 * f[j] + 2.5678435993488205141995e-11;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 4.4455382718708114975964e-10;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 7.0549116208011233298753e-9;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 1.0178086009239699727490e-7;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 1.3215486790144309488404e-6;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 1.5252733804059840280025e-5;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 1.5403530393381609954437e-4;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 1.3333558146428443423412e-3;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 9.6181291076284771619791e-3;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 5.5504108664821579953142e-2;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 2.4022650695910071233355e-1;
    KRUIFY_EACH (j, N) p[j] = p[j] * f[j] + 6.9314718055994530941723e-1;
  }
  KRUIFY_EACH (j, N) r.part[j] = p[j] * f[j];
  return r;
}

template <class T, int N> KRUIFY_INLINE void tanh(Vec<T> (&x)[N]) {
  T scale[N];
  KRUIFY_EACH (j, N) scale[j] = T(-2);
  const Exp<T, N> e = exponential<T, N>(x, scale);
  KRUIFY_EACH (j, N) x[j] = -e.minus1(j) / (e.minus1(j) + T(2));
}

template <class T, int U> struct Lstm {
  Vec<T> i[U], f[U], g[U], o[U], c[U], h[U];  // i, f, g, o only for training
};

// a: the gates i, f, g, o of each vector before activation. Two divisions for three sigmoids and two tanh: numerators
// and denominators are multiplied out.
template <class T, int U, bool Training> KRUIFY_INLINE Lstm<T, U> lstm(const Vec<T> (&a)[4 * U], const Vec<T> (&c)[U]) {
  T scale[4 * U], twice[U];
  KRUIFY_EACH (j, 4 * U) scale[j] = T(j % 4 == 2 ? -2 : -1);
  KRUIFY_EACH (j, U) twice[j] = T(-2);
  const Exp<T, 4 * U> e = exponential<T, 4 * U>(a, scale);
  Lstm<T, U> r;
  KRUIFY_EACH (j, U) {
    const Vec<T> di = e.plus1(4 * j), df = e.plus1(4 * j + 1), eg = e.minus1(4 * j + 2), dg = eg + T(2);
    const Vec<T> both = di * dg, inverse = T(1) / (both * df);
    r.c[j] = (c[j] * both - eg * df) * inverse;
    if (Training) r.i[j] = inverse * df * dg, r.f[j] = inverse * both, r.g[j] = -eg * (inverse * di * df);
  }
  const Exp<T, U> tc = exponential<T, U>(r.c, twice);
  KRUIFY_EACH (j, U) {
    const Vec<T> ec = tc.minus1(j), dc = ec + T(2), inverse = T(1) / (e.plus1(4 * j + 3) * dc);
    r.h[j] = -ec * inverse;
    if (Training) r.o[j] = inverse * dc;
  }
  return r;
}

template <class T, int U> struct Gru {
  Vec<T> r[U], z[U], n[U], h[U];
};

// a: the gates r, z of each vector before activation.
template <class T, int U>
KRUIFY_INLINE Gru<T, U> gru(
    const Vec<T> (&a)[2 * U], const Vec<T> (&n)[U], const Vec<T> (&hn)[U], const Vec<T> (&h)[U]) {
  T scale[2 * U];
  KRUIFY_EACH (j, 2 * U) scale[j] = T(-1);
  const Exp<T, 2 * U> e = exponential<T, 2 * U>(a, scale);
  Gru<T, U> out;
  KRUIFY_EACH (j, U) {
    const Vec<T> dr = e.plus1(2 * j), dz = e.plus1(2 * j + 1), inverse = T(1) / (dr * dz);
    out.r[j] = inverse * dz, out.z[j] = inverse * dr;
    out.n[j] = n[j] + out.r[j] * hn[j];
  }
  tanh<T, U>(out.n);
  KRUIFY_EACH (j, U) out.h[j] = out.n[j] + out.z[j] * (h[j] - out.n[j]);
  return out;
}

// modReLU of a real z: relu(|z| + b) sign(z), 0 at 0. NaN stays NaN.
template <class T> KRUIFY_INLINE Vec<T> modrelu(Vec<T> z, Vec<T> b) {
  const Vec<T> zero{}, size = at_least<T>(zero, (z < zero ? -z : z) + b);
  return z > zero ? size : z < zero ? -size : z;
}

// Its derivative: the gradient of z; that of b is this times sign(z).
template <class T> KRUIFY_INLINE Vec<T> modrelu_backward(Vec<T> z, Vec<T> b, Vec<T> grad) {
  const Vec<T> zero{}, size = z < zero ? -z : z;
  return (size == zero) | (size + b <= zero) ? zero : grad;
}

template <class T> struct Polar {
  Vec<T> size, inverse, re, im;  // |z|, 1/|z|, z/|z|, all 0 at 0
};

// Numbers whose squares would leave the floating-point range are scaled on the way.
template <class T> KRUIFY_INLINE Polar<T> polar(Vec<T> re, Vec<T> im) {
  constexpr bool F = sizeof(T) == 4;
  const Vec<T> zero{}, one = splat<T>(1);
  const Vec<T> a = re < zero ? -re : re, b = im < zero ? -im : im, most = a > b ? a : b;
  const Vec<T> lowest = splat<T>(F ? T(0x1p-50) : T(0x1p-400)), highest = splat<T>(F ? T(0x1p60) : T(0x1p500));
  const auto small = most<lowest, large = most> highest;
  const Vec<T> up = splat<T>(F ? T(0x1p100) : T(0x1p700)), down = splat<T>(F ? T(0x1p-70) : T(0x1p-560));
  const Vec<T> scale = small ? up : large ? down : one, back = small ? one / up : large ? one / down : one;
  re *= scale, im *= scale;
  const Vec<T> square = re * re + im * im, inverse = square == zero ? zero : inverse_root<T>(square);
  return {square * inverse * back, inverse * scale, re * inverse, im * inverse};
}

template <class T> struct Complex {
  Vec<T> re, im;
};

// modReLU of a complex z: relu(|z| + b) z/|z|, 0 at 0 (Arjovsky, Shah, Bengio 2016, equation 8).
template <class T> KRUIFY_INLINE Complex<T> modrelu(Vec<T> re, Vec<T> im, Vec<T> b) {
  const Polar<T> z = polar<T>(re, im);
  const Vec<T> size = at_least<T>(Vec<T>{}, z.size + b);
  return {size * z.re, size * z.im};
}

// Its derivative: along z the gradient passes as it is, across z it is stretched as z is. Returns the gradient of z and
// adds that of b.
template <class T>
KRUIFY_INLINE Complex<T> modrelu_backward(
    Vec<T> re, Vec<T> im, Vec<T> b, Vec<T> grad_re, Vec<T> grad_im, Vec<T>& grad_b) {
  const Polar<T> z = polar<T>(re, im);
  const Vec<T> zero{}, size = z.size + b, along = grad_re * z.re + grad_im * z.im, stretch = size * z.inverse;
  const auto off = (z.size == zero) | (size <= zero);
  grad_b += off ? zero : along;
  return {off ? zero : along * z.re + stretch * (grad_re - along * z.re),
      off ? zero : along * z.im + stretch * (grad_im - along * z.im)};
}

}  // namespace kruify::KRUIFY_ISA
