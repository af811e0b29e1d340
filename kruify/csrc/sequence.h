// The time loop: a thread takes a few samples through all their steps, without waiting for anybody.
#pragma once

#include "cells.h"
#include "stage.h"

namespace kruify::KRUIFY_ISA {

// After the product: gates (i, f, g, o) in y -> h and c; training keeps the gates and c in the workspace.
template <class T>
KRUIFY_INLINE void step_lstm(int64_t H, bool training, T* gates, T* c, T* h, T* out) {
  for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
    const Lstm<T> s = lstm<T>(get(gates + u), get(gates + H + u), get(gates + 2 * H + u), get(gates + 3 * H + u), get(c + u));
    if (training) {
      put(gates + u, s.i), put(gates + H + u, s.f), put(gates + 2 * H + u, s.g), put(gates + 3 * H + u, s.o);
      put(gates + 4 * H + u, s.c);
    }
    put(c + u, s.c), put(h + u, s.h), put(out + u, s.h);
  });
}

template <class T>
KRUIFY_INLINE void step_gru(int64_t H, bool training, T* gates, T* h, T* out) {
  for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
    const Gru<T> s = gru<T>(get(gates + u), get(gates + H + u), get(gates + 2 * H + u), get(gates + 3 * H + u), get(h + u));
    if (training) put(gates + u, s.r), put(gates + H + u, s.z), put(gates + 2 * H + u, s.n);
    put(h + u, s.h), put(out + u, s.h);
  });
}

template <class T>
KRUIFY_INLINE void step_rnn(int64_t H, bool relu, T* gates, T* h, T* out) {
  for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
    const Vec<T> total = get(gates + u);
    const Vec<T> r = relu ? (total < Vec<T>{} ? Vec<T>{} : total) : tanh<T>(total);
    put(h + u, r), put(out + u, r);
  });
}

template <class T>
inline void forward(const Sequence<T>& s, int64_t t0, int64_t t1, int64_t b0, int64_t b1, T* scratch) {
  const int64_t H = s.hidden;
  const Matrix<T>& m = s.matrix;
  for (int64_t i = t0; i < t1; ++i) {
    const int64_t t = s.reverse ? t1 - 1 - (i - t0) : i;
    const int64_t end = min64(b1, s.sizes[t]), nb = end - b0;
    if (nb <= 0) {
      if (s.reverse) continue;
      return;
    }
    const int64_t row = s.starts[t] + b0;
    T* gates = s.gates + (row - s.first_row) * s.gates_ld;
    const int64_t ys = s.gates_ld;
    T* y[kMaxGates];
    for (int g = 0; g < m.gates; ++g) y[g] = gates + g * H;
    if (s.kind == Kind::kGru) {
      // The last gate's product stands apart from the input's share: r comes between them.
      y[2] = gates + 3 * H;
      for (int64_t b = 0; b < nb; ++b)
        for_vectors<T>(H, [&](int64_t u, auto get, auto put) {
          put(y[2] + b * ys + u, m.bias ? get(m.bias + 2 * H + u) : Vec<T>{});
        });
    }
    product(m, nb, s.h + b0 * H, H, y, ys, scratch);
    for (int64_t b = 0; b < nb; ++b) {
      T *h = s.h + (b0 + b) * H, *out = s.out + (row + b) * H;
      if (s.kind == Kind::kGru) step_gru(H, s.training, gates + b * ys, h, out);
      else if (s.kind == Kind::kLstm) step_lstm(H, s.training, gates + b * ys, s.c + (b0 + b) * H, h, out);
      else step_rnn(H, s.kind == Kind::kRnnRelu, gates + b * ys, h, out);
    }
  }
}

template <class T>
inline void backward(const Sequence<T>& s, int64_t b, T* arena, T* scratch) {
  const int64_t H = s.hidden, G = s.matrix.gates, K = s.kind == Kind::kLstm ? 5 : 4;
  const Matrix<T>& m = s.matrix;
  T* dh = s.grad_h + b * H;
  T* dc = s.grad_c ? s.grad_c + b * H : nullptr;
  T* dn = scratch + m.scratch;  // GRU: gradient of W_hn h + b_hn
  int64_t length = 0;
  while (length < s.steps && s.sizes[length] > b) ++length;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t t = s.reverse ? i : length - 1 - i, row = s.starts[t] + b;
    const bool first = i == length - 1;
    const int64_t before = first ? 0 : s.starts[s.reverse ? t + 1 : t - 1] + b;
    const T* h0 = first ? s.h0 + b * H : s.out_in + before * H;
    T* d = s.grad_gates + row * G * H;
    T* dy[kMaxGates];
    for (int g = 0; g < G; ++g) dy[g] = d + g * H;
    if (s.grad_out)
      for_vectors<T>(H, [&](int64_t u, auto get, auto put) { put(dh + u, get(dh + u) + get(s.grad_out + row * H + u)); });
    if (s.kind == Kind::kLstm) {
      const T* w = s.workspace + row * K * H;
      const T* c0 = first ? s.c0 + b * H : s.workspace + before * K * H + 4 * H;
      for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
        const Vec<T> i = get(w + u), f = get(w + H + u), g = get(w + 2 * H + u), o = get(w + 3 * H + u);
        const Vec<T> tc = tanh<T>(get(w + 4 * H + u)), grad = get(dh + u);
        const Vec<T> total = get(dc + u) + grad * o * (T(1) - tc * tc);
        put(d + u, total * g * i * (T(1) - i));
        put(d + H + u, total * get(c0 + u) * f * (T(1) - f));
        put(d + 2 * H + u, total * i * (T(1) - g * g));
        put(d + 3 * H + u, grad * tc * o * (T(1) - o));
        put(dc + u, total * f);
        put(dh + u, Vec<T>{});
      });
    } else if (s.kind == Kind::kGru) {
      const T* w = s.workspace + row * K * H;
      for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
        const Vec<T> r = get(w + u), z = get(w + H + u), n = get(w + 2 * H + u), hn = get(w + 3 * H + u);
        const Vec<T> grad = get(dh + u), da = grad * (T(1) - z) * (T(1) - n * n);
        put(d + u, da * hn * r * (T(1) - r));
        put(d + H + u, grad * (get(h0 + u) - n) * z * (T(1) - z));
        put(d + 2 * H + u, da);
        put(dn + u, da * r);
        put(dh + u, grad * z);
      });
      dy[2] = dn;
    } else {
      const bool relu = s.kind == Kind::kRnnRelu;
      for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
        const Vec<T> h = get(s.out_in + row * H + u), grad = get(dh + u);
        put(d + u, relu ? (h > Vec<T>{} ? grad : Vec<T>{}) : grad * (T(1) - h * h));
        put(dh + u, Vec<T>{});
      });
    }
    product_backward(m, h0, dy, dh, arena, scratch);
  }
}

}  // namespace kruify::KRUIFY_ISA
