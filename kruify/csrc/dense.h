// W itself from its parts, and back: for layers that torch's own kernels run faster than the factors would.
#pragma once

#include "stage.h"

namespace kruify::KRUIFY_ISA {

// out (p0 p1, q0 q1) += a (p0, q0) (x) b (p1, q1)
template <class T>
inline void add_kron(int64_t p0, int64_t q0, const T* a, int64_t p1, int64_t q1, const T* b, T* out) {
  for (int64_t i = 0; i < p0; ++i)
    for (int64_t k = 0; k < p1; ++k, out += q0 * q1)
      for (int64_t j = 0; j < q0; ++j) {
        const Vec<T> s = splat<T>(a[i * q0 + j]);
        for_vectors<T>(q1, [&](int64_t l, auto get, auto put) {
          put(out + j * q1 + l, get(out + j * q1 + l) + s * get(b + k * q1 + l));
        });
      }
}

// The gradients of a and b from that of their product; `sums` holds q0 vectors.
template <class T>
inline void kron_backward(
    int64_t p0, int64_t q0, const T* a, int64_t p1, int64_t q1, const T* b, const T* grad, T* da, T* db, T* sums) {
  constexpr int W = kWidth<T>;
  for (int64_t i = 0; i < p1 * q1; ++i) db[i] = 0;
  for (int64_t i = 0; i < p0; ++i) {
    for (int64_t j = 0; j < q0; ++j) store(sums + j * W, Vec<T>{});
    for (int64_t k = 0; k < p1; ++k, grad += q0 * q1)
      for (int64_t j = 0; j < q0; ++j) {
        const Vec<T> s = splat<T>(a[i * q0 + j]);
        Vec<T> total = load(sums + j * W);
        for_vectors<T>(q1, [&](int64_t l, auto get, auto put) {
          const Vec<T> g = get(grad + j * q1 + l);
          total += g * get(b + k * q1 + l);
          put(db + k * q1 + l, get(db + k * q1 + l) + s * g);
        });
        store(sums + j * W, total);
      }
    for (int64_t j = 0; j < q0; ++j) da[i * q0 + j] = sum<T>(load(sums + j * W));
  }
}

// Sizes and memory of one gate's share of a term: of all ranks the leading stages (rank, p0 q0), a chain's first two
// multiplied, and the rearrangement of their sum, R (p0 q0, p1 q1), which is a plain product of rank `rank`.
template <class T> struct Share {
  int64_t p0, q0, p1, q1;
  const T *a, *b;         // (rank, p0 q0), (rank, p1 q1)
  T *r, *rt, *da, *sums;  // R and its transpose, gradient of a chain's `a`
  int64_t outer() const { return p0 * q0; }
  int64_t inner() const { return p1 * q1; }
};

template <class T> inline Share<T> share_of(const Term<T>& term, int gate, T* memory) {
  const int last = term.stages - 1;
  Share<T> s{term.p[0], term.q[0], term.p[last], term.q[last]};
  s.a = term.w[0] + int64_t(gate) * term.rank * s.outer();
  s.b = term.w[last] + term.place(int64_t(gate) * term.rank) * s.inner();
  if (term.stages == 3) {
    const int64_t first = s.outer(), second = term.p[1] * term.q[1], size = first * second;
    for (int64_t i = 0; i < term.rank * size; ++i) memory[i] = 0;
    for (int64_t r = 0; r < term.rank; ++r)
      add_kron(term.p[0], term.q[0], s.a + r * first, term.p[1], term.q[1],
          term.w[1] + (int64_t(gate) * term.rank + r) * second, memory + r * size);
    s.p0 *= term.p[1], s.q0 *= term.q[1];
    s.a = memory, s.da = memory + term.rank * size, memory += 2 * term.rank * size;
  }
  s.r = memory, s.rt = s.r + s.outer() * s.inner(), s.sums = s.rt + s.outer() * s.inner();
  return s;
}

template <class T> inline void dense(const Matrix<T>& m, T* out, T* scratch) {
  const int64_t size = m.rows * m.cols;
  for_vectors<T>(m.gates * size, [&](int64_t i, auto, auto put) { put(out + i, Vec<T>{}); });
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    for (int g = 0; g < term.gates; ++g) {
      T* w = out + term.gate[g] * size;
      if (term.kind == TermKind::kLowRank) {
        gemm<T, false>(m.rows, m.cols, term.rank, term.w[0] + g * term.rank * m.rows, m.rows,
            term.w[1] + term.place(g * term.rank) * m.cols, m.cols, w, m.cols, true);
        continue;
      }
      if (term.kind == TermKind::kDense) {
        for (int64_t i = int64_t(g) * term.rank; i < int64_t(g + 1) * term.rank; ++i)
          for_vectors<T>(
              size, [&](int64_t k, auto get, auto put) { put(w + k, get(w + k) + get(term.w[0] + i * size + k)); });
        continue;
      }
      const Share<T> s = share_of(term, g, scratch);
      gemm<T, false>(s.outer(), s.inner(), term.rank, s.a, s.outer(), s.b, s.inner(), s.r, s.inner(), false);
      const T* r = s.r;
      for (int64_t i = 0; i < s.p0; ++i)
        for (int64_t j = 0; j < s.q0; ++j)
          for (int64_t k = 0; k < s.p1; ++k, r += s.q1) {
            T* to = w + (i * s.p1 + k) * m.cols + j * s.q1;
            for_vectors<T>(s.q1, [&](int64_t l, auto get, auto put) { put(to + l, get(to + l) + get(r + l)); });
          }
    }
  }
  for (int g = 0; g < m.diagonal_gates && m.diagonal; ++g)
    for (int64_t i = 0; i < m.diagonal_size; ++i)
      out[m.diagonal_gate[g] * size + i * m.cols + i] += m.diagonal[g * m.diagonal_size + i];
  const SparseResidual<T>& r = m.residual;
  for (int64_t b = 0; b < r.blocks; ++b)
    for (int64_t i = 0; i < r.block; ++i)
      out[(r.index[2 * b] + i) * m.cols + r.index[2 * b + 1]] += r.values[b * r.block + i];
}

template <class T> inline void dense_backward(const Matrix<T>& m, const T* grad, T* const* grads, T* scratch) {
  const int64_t size = m.rows * m.cols;
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    const int last = term.stages - 1;
    for (int g = 0; g < term.gates; ++g) {
      const T* dw = grad + term.gate[g] * size;
      if (term.kind == TermKind::kLowRank) {
        const int64_t at = term.place(g * term.rank) * m.cols;
        T *du = grads[0] + g * term.rank * m.rows, *dv = grads[1] + at;
        const T *u = term.w[0] + g * term.rank * m.rows, *v = term.w[1] + at;
        gemm<T, true>(term.rank, m.cols, m.rows, u, m.rows, dw, m.cols, dv, m.cols, term.again(g * term.rank));
        for (int64_t r = 0; r < term.rank; ++r)
          for (int64_t i = 0; i < m.rows; ++i) {
            Vec<T> total{};
            for_vectors<T>(m.cols,
                [&](int64_t j, auto get, auto) { total += get(dw + i * m.cols + j) * get(v + r * m.cols + j); });
            du[r * m.rows + i] = sum<T>(total);
          }
        continue;
      }
      if (term.kind == TermKind::kDense) {
        for (int64_t i = int64_t(g) * term.rank; i < int64_t(g + 1) * term.rank; ++i)
          copy(size, dw, grads[0] + i * size);
        continue;
      }
      const Share<T> s = share_of(term, g, scratch);
      T* r = s.r;
      for (int64_t i = 0; i < s.p0; ++i)
        for (int64_t j = 0; j < s.q0; ++j)
          for (int64_t k = 0; k < s.p1; ++k, r += s.q1) copy(s.q1, dw + (i * s.p1 + k) * m.cols + j * s.q1, r);
      const int64_t start = int64_t(g) * term.rank;
      gemm<T, true>(term.rank, s.inner(), s.outer(), s.a, s.outer(), s.r, s.inner(),
          grads[last] + term.place(start) * s.inner(), s.inner(), term.again(start));
      transpose(s.outer(), s.inner(), s.r, s.inner(), s.rt, s.outer());
      const bool chain = term.stages == 3;
      T* da = chain ? s.da : grads[0] + start * s.outer();
      gemm<T, true>(term.rank, s.outer(), s.inner(), s.b, s.inner(), s.rt, s.outer(), da, s.outer(), false);
      const int64_t first = term.p[0] * term.q[0], second = term.p[1] * term.q[1];
      for (int64_t i = 0; chain && i < term.rank; ++i)
        kron_backward(term.p[0], term.q[0], term.w[0] + (start + i) * first, term.p[1], term.q[1],
            term.w[1] + (start + i) * second, da + i * s.outer(), grads[0] + (start + i) * first,
            grads[1] + (start + i) * second, s.sums);
    }
    grads += term.stages;
  }
  for (int g = 0; g < m.diagonal_gates && m.diagonal; ++g)
    for (int64_t i = 0; i < m.diagonal_size; ++i)
      grads[0][g * m.diagonal_size + i] = grad[m.diagonal_gate[g] * size + i * m.cols + i];
  grads += m.diagonal != nullptr;
  const SparseResidual<T>& r = m.residual;
  for (int64_t b = 0; b < r.blocks; ++b)
    for (int64_t i = 0; i < r.block; ++i)
      grads[0][b * r.block + i] = grad[(r.index[2 * b] + i) * m.cols + r.index[2 * b + 1]];
}

// What both need of scratch memory.
template <class T> inline int64_t dense_scratch(const Matrix<T>& m) {
  int64_t most = 0;
  for (int t = 0; t < m.terms; ++t) {
    const Term<T>& term = m.term[t];
    if (term.kind == TermKind::kDense || term.kind == TermKind::kLowRank) continue;
    const int64_t chain = term.stages == 3 ? term.p[0] * term.q[0] * term.p[1] * term.q[1] : 0;
    const int64_t need = 2 * (term.rank * chain + m.rows * m.cols) + term.q[0] * kWidth<T>;
    if (need > most) most = need;
  }
  return most;
}

}  // namespace kruify::KRUIFY_ISA
