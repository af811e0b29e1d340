// The product with a Kronecker matrix and its derivatives, one sample (or a few) at a time, all in the L1 or L2 cache.
//
// With x seen as a tensor (q0, q1, ...), the trailing stage acts first and on all gates and ranks at once, since they
// share x:  T (q0.., [gate rank p]) = X (q0.., q) Wt (q, [gate rank p]).  The leading stage then acts gate by gate on
// slices of T:  Y[gate] (p0, p) += A[gate rank] (p0, q0) T[., gate rank, .].  SIMD always runs over a trailing index.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "sparse.h"

namespace kruify::KRUIFY_ISA {

template <class T> inline void pack(const Matrix<T>& m) {
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    const int last = term.stages - 1;
    const int64_t n = term.products();
    for (int f = 0; f < last; ++f) {
      const int64_t p = term.p[f], q = term.q[f];
      for (int64_t i = 0; i < n; ++i) transpose(p, q, term.w[f] + i * p * q, q, term.packed[f] + i * p * q, p);
    }
    const int64_t p = term.p[last], q = term.q[last];
    if (term.kind != TermKind::kDense) {
      transpose(term.trailing() * p, q, term.w[last], q, term.packed[last], term.trailing() * p);
      continue;
    }
    T* sum = term.packed[0];  // (q, gates, p), ranks added up
    const int64_t ld = term.gates * p;
    for (int g = 0; g < term.gates; ++g) {
      const T* w = term.w[0] + int64_t(g) * term.rank * p * q;
      transpose(p, q, w, q, sum + g * p, ld);
      for (int r = 1; r < term.rank; ++r)
        for (int64_t i = 0; i < p; ++i)
          for (int64_t j = 0; j < q; ++j) sum[j * ld + g * p + i] += w[(r * p + i) * q + j];
    }
  }
}

template <class T>
inline void product_dense(const Term<T>& term, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys) {
  const int64_t p = term.p[0], ld = term.gates * p;
  for (int g = 0; g < term.gates; ++g)
    gemm<T, true>(nb, p, term.q[0], x, xs, term.packed[0] + g * p, ld, y[term.gate[g]], ys, true);
}

template <class T>
inline void product_low_rank(
    const Term<T>& term, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  const int64_t n = term.trailing(), p = term.p[0];
  for (int64_t s = 0; s < nb; s += 16) {
    const int64_t rows = min64(16, nb - s);
    gemm<T, true>(rows, n, term.q[1], x + s * xs, xs, term.packed[1], n, scratch, n, false);
    for (int g = 0; g < term.gates; ++g)
      gemm<T, true>(rows, p, term.rank, scratch + term.place(g * term.rank), n,
          term.packed[0] + int64_t(g) * term.rank * p, p, y[term.gate[g]] + s * ys, ys, true);
  }
}

// Row length of T in scratch memory: with a power of two elements of one column would share few cache lines.
inline int64_t padded(int64_t width) { return width + 16; }

template <class T>
inline void product_pair(const Term<T>& term, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  const int64_t p0 = term.p[0], q0 = term.q[0], p1 = term.p[1], q1 = term.q[1], n = term.products();
  const int64_t width = term.trailing() * p1, ld = padded(width);
  for (int64_t s = 0; s < nb; ++s) {
    gemm<T, true>(q0, width, q1, x + s * xs, q1, term.packed[1], width, scratch, ld, false);
    for (int64_t i = 0; i < n; ++i)
      gemm<T, false>(p0, p1, q0, term.packed[0] + i * p0 * q0, p0, scratch + term.place(i) * p1, ld,
          y[term.gate[i / term.rank]] + s * ys, p1, true);
  }
}

// The two inner results of a chain: T (q0 q1, trailing p2) from the trailing stage, U[i] (q0, p1, p2) from the middle
// one.
template <class T> inline void chain_inner(const Term<T>& term, const T* x, T* t, T* u) {
  const int64_t q0 = term.q[0], p1 = term.p[1], q1 = term.q[1], p2 = term.p[2], q2 = term.q[2];
  const int64_t n = term.products(), ld = term.trailing() * p2;
  gemm<T, true>(q0 * q1, ld, q2, x, q2, term.packed[2], ld, t, ld, false);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < q0; ++j)
      gemm<T, false>(p1, p2, q1, term.packed[1] + i * p1 * q1, p1, t + j * q1 * ld + term.place(i) * p2, ld,
          u + (i * q0 + j) * p1 * p2, p2, false);
}

template <class T>
inline void product_chain(
    const Term<T>& term, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  const int64_t p0 = term.p[0], q0 = term.q[0], tail = term.p[1] * term.p[2];
  T* u = scratch + q0 * term.q[1] * term.trailing() * term.p[2];
  for (int64_t s = 0; s < nb; ++s) {
    chain_inner(term, x + s * xs, scratch, u);
    for (int64_t i = 0; i < term.products(); ++i)
      gemm<T, false>(p0, tail, q0, term.packed[0] + i * p0 * q0, p0, u + i * q0 * tail, tail,
          y[term.gate[i / term.rank]] + s * ys, tail, true);
  }
}

template <class T>
inline void product_diagonal(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys) {
  for (int g = 0; g < m.diagonal_gates; ++g)
    for (int64_t s = 0; s < nb; ++s) {
      T* out = y[m.diagonal_gate[g]] + s * ys;
      const T *d = m.diagonal + g * m.diagonal_size, *in = x + s * xs;
      for_vectors<T>(m.diagonal_size,
          [&](int64_t i, auto get, auto put) { put(out + i, get(out + i) + get(d + i) * get(in + i)); });
    }
}

// y[g] += W[g] x for nb samples.
template <class T>
inline void product(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    switch (term.kind) {
      case TermKind::kDense: product_dense(term, nb, x, xs, y, ys); break;
      case TermKind::kLowRank: product_low_rank(term, nb, x, xs, y, ys, scratch); break;
      case TermKind::kPair: product_pair(term, nb, x, xs, y, ys, scratch); break;
      case TermKind::kChain: product_chain(term, nb, x, xs, y, ys, scratch); break;
    }
  }
  if (m.diagonal) product_diagonal(m, nb, x, xs, y, ys);
  if (m.residual.values) product_sparse(m, nb, x, xs, y, ys, scratch);
}

// Backward. dW is summed in a thread's arena in the layout the GEMMs write best: of a pair or chain the trailing stage
// as (q, trailing p), the others as given; of a low-rank term both with the long index last; a dense one as (gates, p,
// q).

// All samples at once: each of them alone would read and write all of dW.
template <class T>
inline void backward_dense(
    const Term<T>& term, int64_t nb, const T* x, int64_t xs, T* const* dy, int64_t ys, T* dx, int64_t dxs, T* arena) {
  const int64_t p = term.p[0], q = term.q[0];
  for (int g = 0; g < term.gates; ++g) {
    const T* d = dy[term.gate[g]];
    for (int r = 0; r < term.rank; ++r)
      gemm<T, true>(nb, q, p, d, ys, term.w[0] + (int64_t(g) * term.rank + r) * p * q, q, dx, dxs, true);
    gemm<T, false>(p, q, nb, d, ys, x, xs, arena + term.grad[0] + g * p * q, q, true);
  }
}

template <class T>
inline void backward_low_rank(const Term<T>& term, const T* x, T* const* dy, T* dx, T* arena, T* scratch) {
  const int64_t n = term.trailing(), p = term.p[0], q = term.q[1], rank = term.rank;
  T *t = scratch, *dt = scratch + n;
  gemm<T, true>(1, n, q, x, q, term.packed[1], n, t, n, false);
  for (int g = 0; g < term.gates; ++g) {
    const T* d = dy[term.gate[g]];
    const T* a = term.packed[0] + g * rank * p;  // (rank, p)
    const int64_t at = term.place(g * rank);
    for (int64_t r = 0; r < rank; ++r) {
      Vec<T> total[4] = {};
      int64_t i = 0;
      for (; i + 4 * kWidth<T> <= p; i += 4 * kWidth<T>)
        for (int u = 0; u < 4; ++u) total[u] += load(d + i + u * kWidth<T>) * load(a + r * p + i + u * kWidth<T>);
      for_vectors<T>(p - i, [&](int64_t j, auto get, auto) { total[0] += get(d + i + j) * get(a + r * p + i + j); });
      const T found = sum<T>(total[0] + total[1] + (total[2] + total[3]));
      dt[at + r] = term.again(g * rank) ? dt[at + r] + found : found;
    }
    gemm<T, false>(rank, p, 1, t + at, rank, d, p, arena + term.grad[0] + g * rank * p, p, true);
  }
  gemm<T, true>(1, q, n, dt, n, term.w[1], q, dx, q, true);
  gemm<T, false>(n, q, 1, dt, n, x, q, arena + term.grad[1], q, true);
}

template <class T>
inline void backward_pair(const Term<T>& term, const T* x, T* const* dy, T* dx, T* arena, T* scratch) {
  const int64_t p0 = term.p[0], q0 = term.q[0], p1 = term.p[1], q1 = term.q[1], n = term.products();
  const int64_t width = term.trailing() * p1, ld = padded(width);
  T *xt = scratch, *tt = xt + q0 * q1, *dt = tt + q0 * width;
  transpose(q0, q1, x, q1, xt, q0);
  gemm<T, false>(width, q0, q1, term.packed[1], width, xt, q0, tt, q0, false);  // T transposed: (trailing p1, q0)
  for (int64_t i = 0; i < n; ++i) {
    const T* d = dy[term.gate[i / term.rank]];
    gemm<T, false>(q0, p1, p0, term.w[0] + i * p0 * q0, q0, d, p1, dt + term.place(i) * p1, ld, term.again(i));
    gemm<T, true>(p0, q0, p1, d, p1, tt + term.place(i) * p1 * q0, q0, arena + term.grad[0] + i * p0 * q0, q0, true);
  }
  gemm<T, true>(q0, q1, width, dt, ld, term.w[1], q1, dx, q1, true);
  gemm<T, false>(q1, width, q0, x, q1, dt, ld, arena + term.grad[1], width, true);
}

template <class T>
inline void backward_chain(const Term<T>& term, const T* x, T* const* dy, T* dx, T* arena, T* scratch) {
  const int64_t p0 = term.p[0], q0 = term.q[0], p1 = term.p[1], q1 = term.q[1], p2 = term.p[2], q2 = term.q[2];
  const int64_t n = term.products(), ld = term.trailing() * p2, tail = p1 * p2;
  T *t = scratch, *u = t + q0 * q1 * ld, *dt = u + n * q0 * tail, *du = dt + q0 * q1 * ld, *ut = du + q0 * tail;
  chain_inner(term, x, t, u);
  for (int64_t i = 0; i < n; ++i) {
    const T* d = dy[term.gate[i / term.rank]];
    gemm<T, false>(q0, tail, p0, term.w[0] + i * p0 * q0, q0, d, tail, du, tail, false);
    transpose(q0, tail, u + i * q0 * tail, tail, ut, q0);
    gemm<T, true>(p0, q0, tail, d, tail, ut, q0, arena + term.grad[0] + i * p0 * q0, q0, true);
    for (int64_t j = 0; j < q0; ++j) {
      const int64_t at = j * q1 * ld + term.place(i) * p2;
      T* inner = t + at;  // (q1, p2)
      gemm<T, false>(q1, p2, p1, term.w[1] + i * p1 * q1, q1, du + j * tail, p2, dt + at, ld, term.again(i));
      transpose(q1, p2, inner, ld, ut, q1);
      gemm<T, true>(p1, q1, p2, du + j * tail, p2, ut, q1, arena + term.grad[1] + i * p1 * q1, q1, true);
    }
  }
  gemm<T, true>(q0 * q1, q2, ld, dt, ld, term.w[2], q2, dx, q2, true);
  gemm<T, false>(q2, ld, q0 * q1, x, q2, dt, ld, arena + term.grad[2], ld, true);
}

// One sample's share of everything but dense terms and the sparse residual.
template <class T>
inline void backward_sample(const Matrix<T>& m, const T* x, T* const* dy, T* dx, T* arena, T* scratch) {
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    switch (term.kind) {
      case TermKind::kDense: break;
      case TermKind::kLowRank: backward_low_rank(term, x, dy, dx, arena, scratch); break;
      case TermKind::kPair: backward_pair(term, x, dy, dx, arena, scratch); break;
      case TermKind::kChain: backward_chain(term, x, dy, dx, arena, scratch); break;
    }
  }
  for (int g = 0; g < m.diagonal_gates && m.diagonal; ++g) {
    const T *d = dy[m.diagonal_gate[g]], *w = m.diagonal + g * m.diagonal_size;
    T* dw = arena + m.grad_diagonal + g * m.diagonal_size;
    for_vectors<T>(m.diagonal_size, [&](int64_t i, auto get, auto put) {
      const Vec<T> grad = get(d + i);
      put(dw + i, get(dw + i) + grad * get(x + i));
      put(dx + i, get(dx + i) + grad * get(w + i));
    });
  }
  if (m.bias)
    for (int g = 0; g < m.gates; ++g) {
      T* db = arena + m.grad_bias + g * m.rows;
      for_vectors<T>(m.rows, [&](int64_t i, auto get, auto put) { put(db + i, get(db + i) + get(dy[g] + i)); });
    }
}

// dx += sum_g W[g]^T dy[g] for nb samples; the sums of all gradients in `arena` grow by their share.
template <class T>
inline void product_backward(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* dy, int64_t ys, T* dx,
    int64_t dxs, T* arena, T* scratch) {
  for (int64_t s = 0; s < nb; ++s) {
    T* one[kMaxGates];
    for (int g = 0; g < m.gates; ++g) one[g] = dy[g] + s * ys;
    backward_sample(m, x + s * xs, one, dx + s * dxs, arena, scratch);
  }
  for (int t = 0; t < m.terms; ++t)
    if (m.term[t].kind == TermKind::kDense) backward_dense(m.term[t], nb, x, xs, dy, ys, dx, dxs, arena);
  if (m.residual.values) backward_sparse(m, nb, x, xs, dy, ys, dx, dxs, arena + m.grad_residual, scratch);
}

template <class T> inline void copy(int64_t n, const T* from, T* to) {
  for_vectors<T>(n, [&](int64_t i, auto get, auto put) { put(to + i, get(from + i)); });
}

template <class T> inline void unpack(const Matrix<T>& m, const T* arena, T* const* grads) {
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    const int last = term.stages - 1;
    const int64_t n = term.products();
    for (int f = 0; f < term.stages; ++f, ++grads) {
      const T* sum = arena + term.grad[f];
      const int64_t p = term.p[f], q = term.q[f];
      if (term.kind == TermKind::kDense) {
        for (int64_t i = 0; i < n; ++i) copy(p * q, sum + i / term.rank * p * q, *grads + i * p * q);
      } else if (f == last && term.kind != TermKind::kLowRank) {
        transpose(q, term.trailing() * p, sum, term.trailing() * p, *grads, q);
      } else {
        copy(term.size(f), sum, *grads);  // of a low-rank term p or q is 1: (n, long) either way
      }
    }
  }
  if (m.diagonal) copy(m.diagonal_gates * m.diagonal_size, arena + m.grad_diagonal, *grads++);
  if (m.residual.values) copy(int64_t(m.residual.blocks) * m.residual.block, arena + m.grad_residual, *grads++);
  if (m.bias) copy(m.bias_size, arena + m.grad_bias, *grads++);
}

}  // namespace kruify::KRUIFY_ISA
