// The arithmetic of one step of LSTM, GRU and RNN, one vector of hidden units at a time.
#pragma once

#include "simd.h"

namespace kruify::KRUIFY_ISA {

template <class T>
struct Exp {
  Vec<T> value;   // exp(x)
  Vec<T> minus1;  // exp(x) - 1, accurate near 0
};

// exp(scale * x), the argument clamped so that products of three results stay finite. NaN stays NaN.
template <class T>
KRUIFY_INLINE Exp<T> exponential(Vec<T> x, T scale) {
  constexpr bool F = sizeof(T) == 4;
  const Vec<T> limit = splat<T>(F ? T(41) : T(330));  // powers of two
  Vec<T> y = x * splat<T>(scale * T(1.44269504088896340736));
  y = at_most<T>(limit, y);
  Vec<T> f, power;  // y = n + f with f in [-1/2, 1/2]; power = 2^n
#if defined(__AVX512F__)
  if constexpr (F) {
    const __m512 n = _mm512_roundscale_ps((__m512)y, 8);
    f = y - (Vec<T>)n;
    power = (Vec<T>)_mm512_scalef_ps((__m512)splat<T>(1), n);
  } else {
    const __m512d n = _mm512_roundscale_pd((__m512d)y, 8);
    f = y - (Vec<T>)n;
    power = (Vec<T>)_mm512_scalef_pd((__m512d)splat<T>(1), n);
  }
#else
  using I = typename Simd<T>::I;
  y = at_least<T>(-limit, y);
  const Vec<T> magic = splat<T>(F ? T(12582912) : T(6755399441055744.0));  // 1.5 * 2^(mantissa bits)
  const Vec<T> shifted = y + magic;
  f = y - (shifted - magic);
  const I n = (I)shifted - (I)magic;
  power = (Vec<T>)((n + (F ? 127 : 1023)) << (F ? 23 : 52));
#endif
  Vec<T> p;
  if constexpr (F) {  // Cephes exp2f
    p = splat<T>(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
  } else {  // Taylor, ln2^k / k!
    p = splat<T>(1.3691488853904128880892e-12);
    p = p * f + 2.5678435993488205141995e-11;
    p = p * f + 4.4455382718708114975964e-10;
    p = p * f + 7.0549116208011233298753e-9;
    p = p * f + 1.0178086009239699727490e-7;
    p = p * f + 1.3215486790144309488404e-6;
    p = p * f + 1.5252733804059840280025e-5;
    p = p * f + 1.5403530393381609954437e-4;
    p = p * f + 1.3333558146428443423412e-3;
    p = p * f + 9.6181291076284771619791e-3;
    p = p * f + 5.5504108664821579953142e-2;
    p = p * f + 2.4022650695910071233355e-1;
    p = p * f + 6.9314718055994530941723e-1;
  }
  const Vec<T> pf = p * f;
  return {power + power * pf, power * pf + (power - T(1))};
}

template <class T>
KRUIFY_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = exponential<T>(x, T(-2)).minus1;
  return -e / (e + T(2));
}

template <class T>
struct Lstm {
  Vec<T> i, f, g, o, c, h;
};

// Two divisions for three sigmoids and two tanh: numerators and denominators are multiplied out.
template <class T>
KRUIFY_INLINE Lstm<T> lstm(Vec<T> i, Vec<T> f, Vec<T> g, Vec<T> o, Vec<T> c) {
  const Vec<T> di = exponential<T>(i, T(-1)).value + T(1), df = exponential<T>(f, T(-1)).value + T(1);
  const Vec<T> eg = exponential<T>(g, T(-2)).minus1, dg = eg + T(2);
  const Vec<T> inverse = T(1) / (di * df * dg);
  Lstm<T> r;
  r.i = inverse * df * dg;
  r.f = inverse * di * dg;
  r.g = -eg * (inverse * di * df);
  r.c = r.f * c + r.i * r.g;
  const Vec<T> ec = exponential<T>(r.c, T(-2)).minus1, dc = ec + T(2);
  const Vec<T> d0 = exponential<T>(o, T(-1)).value + T(1);
  const Vec<T> inverse2 = T(1) / (d0 * dc);
  r.o = inverse2 * dc;
  r.h = -ec * inverse2;
  return r;
}

template <class T>
struct Gru {
  Vec<T> r, z, n, h;
};

template <class T>
KRUIFY_INLINE Gru<T> gru(Vec<T> r, Vec<T> z, Vec<T> n, Vec<T> hn, Vec<T> h) {
  const Vec<T> dr = exponential<T>(r, T(-1)).value + T(1), dz = exponential<T>(z, T(-1)).value + T(1);
  const Vec<T> inverse = T(1) / (dr * dz);
  Gru<T> out;
  out.r = inverse * dz;
  out.z = inverse * dr;
  out.n = tanh<T>(n + out.r * hn);
  out.h = out.n + out.z * (h - out.n);
  return out;
}

}  // namespace kruify::KRUIFY_ISA
