// The time loop: a thread takes a few samples through a stretch of steps, without waiting for anybody. Step by step, so
// that what the samples read and write lies in a row.
#pragma once

#include "cells.h"
#include "stage.h"

namespace kruify::KRUIFY_ISA {

// After the product: gates (i, f, g, o) in y -> h and c; training keeps the gates and c in the workspace.
template <class T, bool Training> KRUIFY_INLINE void step_lstm(int64_t H, T* gates, T* c, T* h, T* out) {
  for_groups<T, kTogether<T>>(H, [&]<int U>(int64_t u, auto get, auto put) __attribute__((always_inline)) {
    constexpr int W = kWidth<T>;
    Vec<T> a[4 * U], before[U];
    KRUIFY_EACH (j, 4 * U) a[j] = get(gates + j % 4 * H + u + j / 4 * W);
    KRUIFY_EACH (j, U) before[j] = get(c + u + j * W);
    const Lstm<T, U> s = lstm<T, U, Training>(a, before);
    KRUIFY_EACH (j, U) {
      const int64_t v = u + j * W;
      if (Training) {
        put(gates + v, s.i[j]), put(gates + H + v, s.f[j]), put(gates + 2 * H + v, s.g[j]),
            put(gates + 3 * H + v, s.o[j]);
        put(gates + 4 * H + v, s.c[j]);
      }
      put(c + v, s.c[j]), put(h + v, s.h[j]), put(out + v, s.h[j]);
    }
  });
}

template <class T> KRUIFY_INLINE void step_gru(int64_t H, bool training, T* gates, T* h, T* out) {
  for_groups<T, kTogether<T>>(H, [&]<int U>(int64_t u, auto get, auto put) __attribute__((always_inline)) {
    constexpr int W = kWidth<T>;
    Vec<T> a[2 * U], n[U], hn[U], before[U];
    KRUIFY_EACH (j, 2 * U) a[j] = get(gates + j % 2 * H + u + j / 2 * W);
    KRUIFY_EACH (j, U)
      n[j] = get(gates + 2 * H + u + j * W), hn[j] = get(gates + 3 * H + u + j * W), before[j] = get(h + u + j * W);
    const Gru<T, U> s = gru<T, U>(a, n, hn, before);
    KRUIFY_EACH (j, U) {
      const int64_t v = u + j * W;
      if (training) put(gates + v, s.r[j]), put(gates + H + v, s.z[j]), put(gates + 2 * H + v, s.n[j]);
      put(h + v, s.h[j]), put(out + v, s.h[j]);
    }
  });
}

template <class T> KRUIFY_INLINE void step_rnn(int64_t H, bool relu, T* gates, T* h, T* out) {
  for_groups<T, kTogether<T>>(H, [&]<int U>(int64_t u, auto get, auto put) __attribute__((always_inline)) {
    constexpr int W = kWidth<T>;
    Vec<T> a[U];
    KRUIFY_EACH (j, U) a[j] = get(gates + u + j * W);
    if (relu)
      KRUIFY_EACH (j, U) a[j] = a[j] < Vec<T>{} ? Vec<T>{} : a[j];
    else tanh<T, U>(a);
    KRUIFY_EACH (j, U) put(h + u + j * W, a[j]), put(out + u + j * W, a[j]);
  });
}

// z -> h; a complex z has its real parts first, then its imaginary ones. Training keeps z in the workspace.
template <class T>
KRUIFY_INLINE void step_modrelu(int64_t H, bool complex, const T* threshold, const T* z, T* h, T* out) {
  if (!complex) {
    for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
      const Vec<T> r = modrelu<T>(get(z + u), threshold ? get(threshold + u) : Vec<T>{});
      put(h + u, r), put(out + u, r);
    });
    return;
  }
  const int64_t N = H / 2;
  for_vectors<T>(N, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
    const Complex<T> r = modrelu<T>(get(z + u), get(z + N + u), threshold ? get(threshold + u) : Vec<T>{});
    put(h + u, r.re), put(out + u, r.re), put(h + N + u, r.im), put(out + N + u, r.im);
  });
}

// dh -> dz, and 0 in its place; grad_threshold grows.
template <class T>
KRUIFY_INLINE void back_modrelu(
    int64_t H, bool complex, const T* threshold, const T* z, T* dh, T* dz, T* grad_threshold) {
  if (!complex) {
    for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
      const Vec<T> zero{}, v = get(z + u),
                           d = modrelu_backward<T>(v, threshold ? get(threshold + u) : zero, get(dh + u));
      if (threshold) put(grad_threshold + u, get(grad_threshold + u) + (v < zero ? -d : d));
      put(dz + u, d), put(dh + u, zero);
    });
    return;
  }
  const int64_t N = H / 2;
  for_vectors<T>(N, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
    const Vec<T> zero{};
    Vec<T> b = zero, db = zero;
    if (threshold) b = get(threshold + u), db = get(grad_threshold + u);
    const Complex<T> d = modrelu_backward<T>(get(z + u), get(z + N + u), b, get(dh + u), get(dh + N + u), db);
    if (threshold) put(grad_threshold + u, db);
    put(dz + u, d.re), put(dz + N + u, d.im), put(dh + u, zero), put(dh + N + u, zero);
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
    if (s.kind == kGru) {
      // The last gate's product stands apart from the input's share: r comes between them.
      y[2] = gates + 3 * H;
      for (int64_t b = 0; b < nb; ++b)
        for_vectors<T>(H, [&](int64_t u, auto get, auto put) {
          put(y[2] + b * ys + u, m.bias ? get(m.bias + 2 * H + u) : Vec<T>{});
        });
    }
    for (int64_t b = 0, next; b < nb; b = next) {
      next = min64(nb, b + s.together);
      const T* before = s.h + (b0 + b) * H;
      product(m, next - b, before, H, y, ys, scratch);
      if constexpr (sizeof(T) == 4)
        if (s.int8) int8_kernels().multiply(*s.int8, next - b, before, H, nullptr, y, ys, scratch + m.scratch);
      for (int g = 0; g < m.gates; ++g) y[g] += s.together * ys;
      for (int64_t k = b; k < next; ++k) {
        T *h = s.h + (b0 + k) * H, *out = s.out + (row + k) * H;
        if (s.kind == kGru) step_gru(H, s.training, gates + k * ys, h, out);
        else if (s.kind == kLstm && s.training) step_lstm<T, true>(H, gates + k * ys, s.c + (b0 + k) * H, h, out);
        else if (s.kind == kLstm) step_lstm<T, false>(H, gates + k * ys, s.c + (b0 + k) * H, h, out);
        else if (is_modrelu(s.kind)) step_modrelu(H, s.kind == kModReluComplex, s.threshold, gates + k * ys, h, out);
        else step_rnn(H, s.kind == kRnnRelu, gates + k * ys, h, out);
      }
    }
  }
}

// One sample's step before the product: dh and dc become what flows on beside it, d (gates, H) the gates' gradients.
template <class T>
KRUIFY_INLINE void backward_cell(
    const Sequence<T>& s, int64_t row, const T* h0, const T* c0, T* d, T* dn, T* dh, T* dc, T* grad_threshold) {
  const int64_t H = s.hidden;
  if (s.grad_out)
    for_vectors<T>(H, [&](int64_t u, auto get, auto put) { put(dh + u, get(dh + u) + get(s.grad_out + row * H + u)); });
  if (s.kind == kLstm) {
    const T* w = s.workspace + row * 5 * H;
    for_groups<T, kTogether<T>>(H, [&]<int U>(int64_t start, auto get, auto put) __attribute__((always_inline)) {
      Vec<T> tanh_c[U];
      KRUIFY_EACH (j, U) tanh_c[j] = get(w + 4 * H + start + j * kWidth<T>);
      tanh<T, U>(tanh_c);
      KRUIFY_EACH (j, U) {
        const int64_t u = start + j * kWidth<T>;
        const Vec<T> i = get(w + u), f = get(w + H + u), g = get(w + 2 * H + u), o = get(w + 3 * H + u);
        const Vec<T> tc = tanh_c[j], grad = get(dh + u), total = get(dc + u) + grad * o * (T(1) - tc * tc);
        put(d + u, total * g * i * (T(1) - i));
        put(d + H + u, total * get(c0 + u) * f * (T(1) - f));
        put(d + 2 * H + u, total * i * (T(1) - g * g));
        put(d + 3 * H + u, grad * tc * o * (T(1) - o));
        put(dc + u, total * f);
        put(dh + u, Vec<T>{});
      }
    });
  } else if (s.kind == kGru) {
    const T* w = s.workspace + row * 4 * H;
    for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
      const Vec<T> r = get(w + u), z = get(w + H + u), n = get(w + 2 * H + u), hn = get(w + 3 * H + u);
      const Vec<T> grad = get(dh + u), da = grad * (T(1) - z) * (T(1) - n * n);
      put(d + u, da * hn * r * (T(1) - r));
      put(d + H + u, grad * (get(h0 + u) - n) * z * (T(1) - z));
      put(d + 2 * H + u, da);
      put(dn + u, da * r);
      put(dh + u, grad * z);
    });
  } else if (is_modrelu(s.kind)) {
    back_modrelu(H, s.kind == kModReluComplex, s.threshold, s.workspace + row * H, dh, d, grad_threshold);
  } else {
    const bool relu = s.kind == kRnnRelu;
    for_vectors<T>(H, [&](int64_t u, auto get, auto put) __attribute__((always_inline)) {
      const Vec<T> h = get(s.out_in + row * H + u), grad = get(dh + u);
      put(d + u, relu ? (h > Vec<T>{} ? grad : Vec<T>{}) : grad * (T(1) - h * h));
      put(dh + u, Vec<T>{});
    });
  }
}

// Asks the memory for n numbers.
template <class T> KRUIFY_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

template <class T>
inline void backward(const Sequence<T>& s, int64_t t0, int64_t t1, int64_t b0, int64_t b1, T* arena, T* scratch) {
  const int64_t H = s.hidden, ys = s.gates_ld;
  const Matrix<T>& m = s.matrix;
  T* dn = scratch + m.scratch;  // GRU: gradients of W_hn h + b_hn, rows as far apart as those of grad_gates
  for (int64_t i = t0; i < t1; ++i) {
    const int64_t t = s.reverse ? i : t1 - 1 - (i - t0);
    const int64_t end = min64(b1, s.sizes[t]);
    // Samples [b0, known) have a step before this one; for the others it is the first, and h0 stands before it.
    const int64_t known = !s.reverse ? (t > 0 ? end : b0) : t + 1 < s.steps ? min64(end, s.sizes[t + 1]) : b0;
    for (int64_t b = b0, next; b < end; b = next) {
      const bool first = b >= known;
      next = min64(first ? end : known, b + s.together);
      const int64_t row = s.starts[t] + b, before = first ? b : s.starts[s.reverse ? t + 1 : t - 1] + b;
      const T* h0 = (first ? s.h0 : s.out_in) + before * H;
      T* dy[kMaxGates];
      for (int g = 0; g < m.gates; ++g) dy[g] = s.grad_gates + (row - s.first_row) * ys + g * H;
      for (int64_t k = 0; k < next - b; ++k) {
        const T* c0 = s.kind != kLstm ? nullptr
            : first                   ? s.c0 + (b + k) * H
                                      : s.workspace + (before + k) * 5 * H + 4 * H;
        backward_cell(s, row + k, h0 + k * H, c0, dy[0] + k * ys, dn + k * ys, s.grad_h + (b + k) * H,
            s.grad_c ? s.grad_c + (b + k) * H : nullptr, arena + m.grad_bias);
      }
      if (s.kind == kGru) dy[2] = dn;
      if (!first) {
        // What the next step reads, while the products of this one run.
        const int64_t n = (next - b) * H,
                      ahead = next < end ? s.starts[t] + next : s.starts[s.reverse ? t + 1 : t - 1] + b0;
        if (s.grad_out) prefetch(s.grad_out + ahead * H, n);
        prefetch(s.workspace + ahead * s.saved * H, n * s.saved);
        if (next < end) prefetch(h0 + (next - b) * H, n);
      }
      product_backward(m, next - b, h0, H, dy, ys, s.grad_h + b * H, H, arena, scratch);
    }
  }
}

}  // namespace kruify::KRUIFY_ISA
