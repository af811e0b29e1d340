// One hidden unit's step: gates to state, and the derivative. Formulas and names as in ops/reference.py.
#pragma once

#include <cmath>

#include "../matrix.h"
#include "host_device.h"

namespace kruify::cuda {

// saved_of where the number of gates tells the kind.
constexpr KRUIFY_HD int saved_of_gates(int gates) { return gates == 4 ? 5 : gates == 3 ? 4 : 0; }

KRUIFY_HD float exponential(float x) { return expf(x); }
KRUIFY_HD double exponential(double x) { return exp(x); }
KRUIFY_HD float hyperbolic(float x) { return tanhf(x); }
KRUIFY_HD double hyperbolic(double x) { return tanh(x); }
KRUIFY_HD float magnitude(float x, float y) { return hypotf(x, y); }
KRUIFY_HD double magnitude(double x, double y) { return hypot(x, y); }

template <class T> KRUIFY_HD T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }

// x: the input's share of the gates; y: W h + b; saved: what the backward pass needs. Returns h, updates c.
template <int G, class T>
KRUIFY_HD T cell_forward(const T (&x)[G], const T (&y)[G], T h, T& c, Kind kind, T (&saved)[5]) {
  if constexpr (G == 4) {
    const T i = sigmoid(x[0] + y[0]), f = sigmoid(x[1] + y[1]), g = hyperbolic(x[2] + y[2]), o = sigmoid(x[3] + y[3]);
    c = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return o * hyperbolic(c);
  } else if constexpr (G == 3) {
    const T r = sigmoid(x[0] + y[0]), z = sigmoid(x[1] + y[1]), n = hyperbolic(x[2] + r * y[2]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = y[2];
    return n + z * (h - n);
  } else {
    const T total = x[0] + y[0];
    return kind == kRnnRelu ? (total < T(0) ? T(0) : total) : hyperbolic(total);  // NaN stays NaN
  }
}

// dh: gradient of this step's h. saved as above; h_before, c_before: the state the step started from; h: its result.
// Writes the gradients of the gates before activation and of W h + b; updates dc; returns what of dh passes by W.
template <int G, class T>
KRUIFY_HD T cell_backward(
    T dh, const T (&saved)[5], T h, T h_before, T c_before, Kind kind, T& dc, T (&gates)[G], T (&product)[G]) {
  if constexpr (G == 4) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = hyperbolic(saved[4]);
    const T total = dc + dh * o * (T(1) - tanh_c * tanh_c);
    gates[0] = total * g * i * (T(1) - i);
    gates[1] = total * c_before * f * (T(1) - f);
    gates[2] = total * i * (T(1) - g * g);
    gates[3] = dh * tanh_c * o * (T(1) - o);
    dc = total * f;
    for (int k = 0; k < G; ++k) product[k] = gates[k];
    return T(0);
  } else if constexpr (G == 3) {
    const T r = saved[0], z = saved[1], n = saved[2], y = saved[3];
    const T dn = dh * (T(1) - z) * (T(1) - n * n);
    gates[0] = dn * y * r * (T(1) - r);
    gates[1] = dh * (h_before - n) * z * (T(1) - z);
    gates[2] = dn;
    product[0] = gates[0], product[1] = gates[1], product[2] = dn * r;
    return dh * z;
  } else {
    gates[0] = product[0] = kind == kRnnRelu ? (h > T(0) ? dh : T(0)) : dh * (T(1) - h * h);
    return T(0);
  }
}

// modReLU's unit: z and h are (re, im), im = 0 for a real one; im stands H / 2 behind re in every array.
template <class T> KRUIFY_HD void modrelu_forward(const T (&z)[2], T b, T (&h)[2]) {
  const T size = magnitude(z[0], z[1]), length = size + b < T(0) ? T(0) : size + b;  // NaN stays NaN
  KRUIFY_UNROLL
  for (int k = 0; k < 2; ++k) h[k] = size == T(0) ? T(0) : length * (z[k] / size);
}

// dh becomes dz: along z as it comes, across z stretched as z is.
template <class T> KRUIFY_HD void modrelu_backward(const T (&z)[2], T b, T (&d)[2]) {
  const T size = magnitude(z[0], z[1]), length = size + b;
  const bool off = size == T(0) || length <= T(0);
  const T re = z[0] / size, im = z[1] / size, along = d[0] * re + d[1] * im, stretch = length / size;
  d[0] = off ? T(0) : along * re + stretch * (d[0] - along * re);
  d[1] = off ? T(0) : along * im + stretch * (d[1] - along * im);
}

}  // namespace kruify::cuda
