// The recurrence for any sum of Kronecker products: any number of terms and stages, ranks, diagonal, sparse residual;
// float32 and float64. One block per row of the batch; its vectors lie in shared memory where they fit, else in global
// scratch. Plain loops, one output per item: they take every structure and are fast for none.
#pragma once

#include "gates.h"
#include "parts.h"
#include "rows.h"

namespace kruify::cuda {

constexpr int kMaxTerms = 16;  // of one launch; the host forms the dense matrix beyond them

// One stage on its way through a term: (a, Q, b) -> (a, P, b) for every gate and rank.
template <class T> struct Op {
  const T* data;  // (gates, rank, P, Q)
  int products;   // gates * rank, or rank where the gates have the stage in common
  int P, Q, a, b;
  int stage;  // which of the term's stages it is
  KRUIFY_HD int in() const { return a * Q * b; }
  KRUIFY_HD int out() const { return a * P * b; }
  KRUIFY_HD T apply(int pair, const T* x, int item) const {
    const T* m = data + (static_cast<int64_t>(pair % products) * P + item / b % P) * Q;
    const T* from = x + static_cast<int64_t>(item / (b * P)) * Q * b + item % b;
    T sum = 0;
    for (int q = 0; q < Q; ++q) sum += m[q] * from[static_cast<int64_t>(q) * b];
    return sum;
  }
  KRUIFY_HD T apply_transposed(int pair, const T* y, int item) const {
    const T* m = data + static_cast<int64_t>(pair % products) * P * Q + item / b % Q;
    const T* from = y + static_cast<int64_t>(item / (b * Q)) * P * b + item % b;
    T sum = 0;
    for (int p = 0; p < P; ++p) sum += m[static_cast<int64_t>(p) * Q] * from[static_cast<int64_t>(p) * b];
    return sum;
  }
};

struct ProgramTerm {
  int first, count;  // its ops, in the order they are applied
  int gates, rank;
  int gate[kMaxGates];
};

template <class T> struct Program {
  int hidden, gates, terms, width;  // width: elements of the widest intermediate
  ProgramTerm term[kMaxTerms];
  Op<T> op[kMaxTerms * kMaxStages];
  Diagonal<T> diagonal;
  SparseResidual<T> residual;
  const T* bias;
};

// The arrays of a recurrence, forward and backward, for all kernels. All of a layer's rows are packed: (S, ...).
template <class T> struct ForwardArrays {
  const T* x;        // (S, G * H), the input's share of the gates
  const T *h0, *c0;  // (B, H)
  T *out, *h_last, *c_last;
  T* workspace;  // (S, saved * H), or null
  Rows rows;
  Kind kind;
  const T* threshold;  // modReLU's bias, or null
};

template <class T> struct BackwardArrays {
  const T *grad_out, *grad_h, *grad_c;  // each may be null
  const T *out, *workspace, *h0, *c0;
  T* grad_gates;         // (S, G * H)
  T* grad_product;       // (S, G * H) for the GRU, else null: the same as grad_gates
  T *grad_h0, *grad_c0;  // (B, H)
  Rows rows;
  Kind kind;
  const T* threshold;
};

// One unit's way back through the cell of step n (`row`; `before` is that of the step before): the gradients of the
// gates to memory, those of W h to `product`; dh and dc are those of its results. Returns what of dh passes by W.
template <int G, class T>
KRUIFY_HD T unit_backward(const BackwardArrays<T>& args, int hidden, int n, int64_t row, int64_t before, int sample,
    int i, T dh, T& dc, T (&product)[G]) {
  constexpr int kept = saved_of_gates(G);
  if (args.grad_out) dh += args.grad_out[row * hidden + i];
  T saved[5], gates[G], h_before = 0, c_before = 0;
  KRUIFY_UNROLL
  for (int k = 0; k < kept; ++k) saved[k] = args.workspace[(row * kept + k) * hidden + i];
  const int64_t first = static_cast<int64_t>(sample) * hidden + i;
  if constexpr (G == 3) h_before = n ? args.out[before * hidden + i] : args.h0[first];
  if constexpr (G == 4) c_before = n ? args.workspace[(before * kept + 4) * hidden + i] : args.c0[first];
  const T h = G == 1 ? args.out[row * hidden + i] : T(0);
  const T carry = cell_backward<G>(dh, saved, h, h_before, c_before, args.kind, dc, gates, product);
  KRUIFY_UNROLL
  for (int g = 0; g < G; ++g) {
    args.grad_gates[(row * G + g) * hidden + i] = gates[g];
    if (G == 3) args.grad_product[(row * G + g) * hidden + i] = product[g];
  }
  return carry;
}

// Elements of the scratch that a block needs.
template <class T> KRUIFY_HD int64_t general_scratch(const Program<T>& m) {
  return static_cast<int64_t>(m.hidden) * (m.gates + 3) + 2 * static_cast<int64_t>(m.width);
}

template <int G, class T> struct GeneralPhases {
  const Program<T>& m;

  KRUIFY_HD T* h(const Thread& t) const { return reinterpret_cast<T*>(t.memory); }  // backward: dh
  KRUIFY_HD T* c(const Thread& t) const { return h(t) + m.hidden; }                 // backward: dc
  KRUIFY_HD T* carry(const Thread& t) const { return h(t) + 2 * m.hidden; }
  KRUIFY_HD T* y(const Thread& t) const { return h(t) + 3 * m.hidden; }
  KRUIFY_HD T* buffer(const Thread& t, int which) const {
    return y(t) + G * m.hidden + (which & 1) * static_cast<int64_t>(m.width);
  }

  KRUIFY_HD void start(const Thread& t) const {
    for (int e = t.id; e < G * m.hidden; e += t.count) {
      const int g = e / m.hidden, i = e % m.hidden;
      T sum = m.bias ? m.bias[e] : T(0);
      if (const T* d = m.diagonal.of(g, m.hidden)) sum += d[i] * h(t)[i];
      if (m.residual.values) sum += row_product(m.residual, e, h(t));
      y(t)[e] = sum;
    }
  }
  KRUIFY_HD void step(const Thread& t, const ProgramTerm& term, int k) const {
    const Op<T>& op = m.op[term.first + k];
    const int pairs = term.gates * term.rank;
    const T* from = k ? buffer(t, k) : h(t);
    const int64_t stride = k ? op.in() : 0;
    if (k + 1 < term.count) {
      T* to = buffer(t, k + 1);
      for (int e = t.id; e < pairs * op.out(); e += t.count)
        to[e] = op.apply(e / op.out(), from + e / op.out() * stride, e % op.out());
    } else {
      for (int e = t.id; e < term.gates * m.hidden; e += t.count) {
        const int gate = e / m.hidden, i = e % m.hidden;
        T sum = 0;
        for (int pair = gate * term.rank; pair < (gate + 1) * term.rank; ++pair)
          sum += op.apply(pair, from + pair * stride, i);
        y(t)[term.gate[gate] * m.hidden + i] += sum;
      }
    }
  }
  KRUIFY_HD void start_transposed(const Thread& t) const {
    for (int i = t.id; i < m.hidden; i += t.count) {
      T sum = carry(t)[i];
      for (int g = 0; g < G; ++g)
        if (const T* d = m.diagonal.of(g, m.hidden)) sum += d[i] * y(t)[g * m.hidden + i];
      if (m.residual.values) sum += column_product(m.residual, i, y(t));
      h(t)[i] = sum;
    }
  }
  KRUIFY_HD void step_transposed(const Thread& t, const ProgramTerm& term, int k) const {
    const Op<T>& op = m.op[term.first + k];
    const int pairs = term.gates * term.rank;
    const bool first = k + 1 == term.count;
    const T* from = first ? y(t) : buffer(t, k + 1);
    auto part = [&](int pair) {
      return from +
          (first ? static_cast<int64_t>(term.gate[pair / term.rank]) * m.hidden
                 : static_cast<int64_t>(pair) * op.out());
    };
    if (k) {
      T* to = buffer(t, k);
      for (int e = t.id; e < pairs * op.in(); e += t.count)
        to[e] = op.apply_transposed(e / op.in(), part(e / op.in()), e % op.in());
    } else {
      for (int i = t.id; i < m.hidden; i += t.count) {
        T sum = 0;
        for (int pair = 0; pair < pairs; ++pair) sum += op.apply_transposed(pair, part(pair), i);
        h(t)[i] += sum;
      }
    }
  }

  KRUIFY_HD void modrelu(const Thread& t, const ForwardArrays<T>& args, int64_t row) const {
    const int parts = rows_per_bias(args.kind), units = m.hidden / parts;
    for (int i = t.id; i < units; i += t.count) {
      T z[2] = {}, now[2];
      for (int k = 0; k < parts; ++k) {
        const int64_t at = row * m.hidden + i + k * units;
        z[k] = args.x[at] + y(t)[i + k * units];
        if (args.workspace) args.workspace[at] = z[k];
      }
      modrelu_forward(z, args.threshold ? args.threshold[i] : T(0), now);
      for (int k = 0; k < parts; ++k) h(t)[i + k * units] = args.out[row * m.hidden + i + k * units] = now[k];
    }
  }
  KRUIFY_HD void modrelu(const Thread& t, const BackwardArrays<T>& args, int64_t row) const {
    const int parts = rows_per_bias(args.kind), units = m.hidden / parts;
    for (int i = t.id; i < units; i += t.count) {
      T z[2] = {}, d[2] = {};
      for (int k = 0; k < parts; ++k) {
        const int64_t at = row * m.hidden + i + k * units;
        z[k] = args.workspace[at], d[k] = h(t)[i + k * units];
        if (args.grad_out) d[k] += args.grad_out[at];
      }
      modrelu_backward(z, args.threshold ? args.threshold[i] : T(0), d);
      for (int k = 0; k < parts; ++k) {
        args.grad_gates[row * m.hidden + i + k * units] = y(t)[i + k * units] = d[k];
        carry(t)[i + k * units] = T(0);
      }
    }
  }
};

template <int G, class T, class Block>
KRUIFY_HD void general_recurrence(Block& block, const Program<T>& m, const ForwardArrays<T>& args, int sample) {
  const GeneralPhases<G, T> phases{m};
  const int length = args.rows.length(sample);
  const int64_t own = static_cast<int64_t>(sample) * m.hidden;
  constexpr int kept = saved_of_gates(G);
  block.each([&](const Thread& t) {
    for (int i = t.id; i < m.hidden; i += t.count) {
      phases.h(t)[i] = args.h0[own + i];
      if (G == 4) phases.c(t)[i] = args.c0[own + i];
    }
  });
  for (int n = 0; n < length; ++n) {
    block.barrier();
    block.each([&](const Thread& t) { phases.start(t); });
    block.barrier();
    for (int k = 0; k < m.terms; ++k)
      for (int o = 0; o < m.term[k].count; ++o) {
        block.each([&, k, o](const Thread& t) { phases.step(t, m.term[k], o); });
        block.barrier();
      }
    const int64_t row = args.rows.row(n, sample, length);
    block.each([&, row](const Thread& t) {
      if (is_modrelu(args.kind)) return phases.modrelu(t, args, row);
      for (int i = t.id; i < m.hidden; i += t.count) {
        T gates[G], product[G], saved[5], c = G == 4 ? phases.c(t)[i] : T(0);
        for (int g = 0; g < G; ++g) {
          gates[g] = args.x[(row * G + g) * m.hidden + i];
          product[g] = phases.y(t)[g * m.hidden + i];
        }
        const T now = cell_forward<G>(gates, product, phases.h(t)[i], c, args.kind, saved);
        phases.h(t)[i] = args.out[row * m.hidden + i] = now;
        if (G == 4) phases.c(t)[i] = c;
        if (G > 1 && args.workspace)
          for (int k = 0; k < kept; ++k) args.workspace[(row * kept + k) * m.hidden + i] = saved[k];
      }
    });
  }
  block.barrier();  // a complex unit's thread wrote both its parts
  block.each([&](const Thread& t) {
    for (int i = t.id; i < m.hidden; i += t.count) {
      args.h_last[own + i] = phases.h(t)[i];
      if (G == 4) args.c_last[own + i] = phases.c(t)[i];
    }
  });
  block.end();
}

template <int G, class T, class Block>
KRUIFY_HD void general_recurrence(Block& block, const Program<T>& m, const BackwardArrays<T>& args, int sample) {
  const GeneralPhases<G, T> phases{m};
  const int length = args.rows.length(sample);
  const int64_t own = static_cast<int64_t>(sample) * m.hidden;
  block.each([&](const Thread& t) {
    for (int i = t.id; i < m.hidden; i += t.count) {
      phases.h(t)[i] = args.grad_h ? args.grad_h[own + i] : T(0);
      if (G == 4) phases.c(t)[i] = args.grad_c ? args.grad_c[own + i] : T(0);
    }
  });
  for (int n = length - 1; n >= 0; --n) {
    const int64_t row = args.rows.row(n, sample, length), before = n ? args.rows.row(n - 1, sample, length) : 0;
    block.barrier();
    block.each([&, n, row, before](const Thread& t) {
      if (is_modrelu(args.kind)) return phases.modrelu(t, args, row);
      for (int i = t.id; i < m.hidden; i += t.count) {
        T product[G], c = G == 4 ? phases.c(t)[i] : T(0);
        phases.carry(t)[i] = unit_backward<G>(args, m.hidden, n, row, before, sample, i, phases.h(t)[i], c, product);
        if (G == 4) phases.c(t)[i] = c;
        for (int g = 0; g < G; ++g) phases.y(t)[g * m.hidden + i] = product[g];
      }
    });
    block.barrier();
    block.each([&](const Thread& t) { phases.start_transposed(t); });
    block.barrier();
    for (int k = 0; k < m.terms; ++k)
      for (int o = m.term[k].count - 1; o >= 0; --o) {
        block.each([&, k, o](const Thread& t) { phases.step_transposed(t, m.term[k], o); });
        block.barrier();
      }
  }
  block.barrier();
  block.each([&](const Thread& t) {
    for (int i = t.id; i < m.hidden; i += t.count) {
      args.grad_h0[own + i] = phases.h(t)[i];
      if (G == 4) args.grad_c0[own + i] = phases.c(t)[i];
    }
  });
  block.end();
}

}  // namespace kruify::cuda
