// The arithmetic of one step of LSTM, GRU, RNN and KRU, one vector of hidden units at a time.
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

// modReLU of a real z: relu(|z| + b) sign(z), 0 at 0. NaN stays NaN.
template <class T>
KRUIFY_INLINE Vec<T> modrelu(Vec<T> z, Vec<T> b) {
  const Vec<T> zero{}, size = at_least<T>(zero, (z < zero ? -z : z) + b);
  return z > zero ? size : z < zero ? -size : z;
}

// Its derivative: the gradient of z; that of b is this times sign(z).
template <class T>
KRUIFY_INLINE Vec<T> modrelu_backward(Vec<T> z, Vec<T> b, Vec<T> grad) {
  const Vec<T> zero{}, size = z < zero ? -z : z;
  return (size == zero) | (size + b <= zero) ? zero : grad;
}

template <class T>
struct Polar {
  Vec<T> size, re, im;  // |z| and z/|z|, 0 at 0
};

// Numbers whose squares would leave the floating-point range are scaled on the way.
template <class T>
KRUIFY_INLINE Polar<T> polar(Vec<T> re, Vec<T> im) {
  constexpr bool F = sizeof(T) == 4;
  const Vec<T> zero{}, one = splat<T>(1);
  const Vec<T> a = re < zero ? -re : re, b = im < zero ? -im : im, most = a > b ? a : b;
  const auto small = most < splat<T>(F ? T(0x1p-50) : T(0x1p-400)), large = most > splat<T>(F ? T(0x1p60) : T(0x1p500));
  const Vec<T> up = splat<T>(F ? T(0x1p100) : T(0x1p700)), down = splat<T>(F ? T(0x1p-70) : T(0x1p-560));
  const Vec<T> scale = small ? up : large ? down : one, back = small ? one / up : large ? one / down : one;
  re *= scale, im *= scale;
  const Vec<T> size = square_root<T>(re * re + im * im), inverse = size == zero ? zero : one / size;
  return {size * back, re * inverse, im * inverse};
}

template <class T>
struct Complex {
  Vec<T> re, im;
};

// modReLU of a complex z: relu(|z| + b) z/|z|, 0 at 0 (Arjovsky, Shah, Bengio 2016, equation 8).
template <class T>
KRUIFY_INLINE Complex<T> modrelu(Vec<T> re, Vec<T> im, Vec<T> b) {
  const Polar<T> z = polar<T>(re, im);
  const Vec<T> size = at_least<T>(Vec<T>{}, z.size + b);
  return {size * z.re, size * z.im};
}

// Its derivative: along z the gradient passes as it is, across z it is stretched as z is. Returns the gradient of z and
// adds that of b.
template <class T>
KRUIFY_INLINE Complex<T> modrelu_backward(Vec<T> re, Vec<T> im, Vec<T> b, Vec<T> grad_re, Vec<T> grad_im, Vec<T>& grad_b) {
  const Polar<T> z = polar<T>(re, im);
  const Vec<T> zero{}, size = z.size + b, along = grad_re * z.re + grad_im * z.im, stretch = size / z.size;
  const auto off = (z.size == zero) | (size <= zero);
  grad_b += off ? zero : along;
  return {off ? zero : along * z.re + stretch * (grad_re - along * z.re),
          off ? zero : along * z.im + stretch * (grad_im - along * z.im)};
}

}  // namespace kruify::KRUIFY_ISA
