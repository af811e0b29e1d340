// What may stand beside the outer products of a low-rank recurrence, in float32: a term of two square stages for all
// gates, W[g] += sum_k A[g, k] (x) B[g, k], and a small sparse residual. Unlike outer products they need all of h:
//
//   forward    every block has h of all units (two buffers in a cluster, each unit written by the block that owns it)
//     t[pair][p1, q2] = sum_q1 A[pair][p1, q1] h[q1, q2], of the block's own p1     with phase 3 of low_rank_forward.h
//     gate[g][p1, p2] += sum over the gate's pairs and q2 of t B[p2, q2]            after its phase 4
//   backward   a block knows d for its own units alone: it sends every unit's owner its part of dh
//     t[pair][q2, p1] = sum_p2 B[pair][p2, q2] d[g][p1, p2], of the block's own p1  with phase 2 of low_rank_backward.h
//     part of dh[q1, q2] = sum over all pairs and the own p1 of A[p1, q1] t         before its arrival
//
// and so the sparse residual, whose blocks (their first row, their column and their numbers) each block keeps of its
// own rows, forward by row and backward by column. Where more of them fall to one block than it has room for, that
// block reads them from global memory.
#pragma once

#include "low_rank_phases.h"
#include "pair_forward.h"

namespace kruify::cuda {

struct Beside {
  const float *a, *b;  // (G, pairs, P1, P1), (G, pairs, P2, P2)
  SparseResidual<float> residual;
};

template <int G, class Numbers> struct BesidePhases : LowRankPhases<Numbers> {
  using Base = LowRankPhases<Numbers>;
  using Base::at, Base::p;
  const Beside& beside;

  static KRUIFY_HD int padded(int n) { return row_words(kFloat32, n); }
  KRUIFY_HD int pairs() const { return G * p.pair; }
  KRUIFY_HD int* ints(const Thread& t, int offset) const { return reinterpret_cast<int*>(at(t, offset)); }
  KRUIFY_HD float* values(const Thread& t, int k) const { return at(t, p.values) + k * p.block; }
  KRUIFY_HD bool held(const Thread& t) const { return ints(t, p.held)[0] <= p.blocks; }
};

template <int G, class Numbers> struct BesideForward : BesidePhases<G, Numbers> {
  using Base = BesidePhases<G, Numbers>;
  using Base::at, Base::beside, Base::ints, Base::p, Base::padded, Base::pairs;

  // h of all units, those of one row of the batch: (P2, P1), padded, so that phase 1 sums along rows.
  KRUIFY_HD float* whole(const Thread& t, int step, int r) const {
    return at(t, p.whole) + ((p.cluster > 1 ? step & 1 : 0) * p.rows + r) * p.stretch;
  }
  KRUIFY_HD int place(int unit) const {
    const Split e = p.by_p2.split(unit);
    return e.remainder * padded(p.P1) + e.quotient;
  }

  KRUIFY_HD void load_beside(const Thread& t, const float* h0) const {
    for (int e = t.id; e < p.rows * p.hidden; e += t.count) {
      const int r = e / p.hidden, i = e % p.hidden;
      const bool there = this->sample + r < this->all.batch;
      whole(t, 0, r)[place(i)] = there ? h0[static_cast<int64_t>(this->sample + r) * p.hidden + i] : 0.0f;
    }
    if (p.pair) {
      load_rows<Exact<4>>(t, at(t, p.a), beside.a, pairs(), p.P1, p.P1, t.rank * p.own, p.own);
      load_rows<Exact<4>>(t, at(t, p.b), beside.b, pairs(), p.P2, p.P2, 0, p.P2);
    }
    if (p.blocks) load_sparse(t);
  }

  // The blocks that start in one of the rows which reach into the block's share of a gate.
  struct Slab {
    int first, last;
  };
  KRUIFY_HD Slab slab(const Thread& t, int gate) const {
    const int row = gate * p.hidden + this->start(t), owned = this->owned(t);
    return owned ? Slab{starts_above(row), beside.residual.row_start[row + owned]} : Slab{0, 0};
  }
  // The first block that reaches into a row or below.
  KRUIFY_HD int starts_above(int row) const {
    const int above = row - p.block + 1;
    return beside.residual.row_start[above > 0 ? above : 0];
  }
  KRUIFY_HD void load_sparse(const Thread& t) const {
    const SparseResidual<float>& s = beside.residual;
    int total = 0;
    for (int g = 0; g < G; ++g) total += slab(t, g).last - slab(t, g).first;
    if (t.id == 0) ints(t, p.held)[0] = total;
    const bool held = total <= p.blocks;
    for (int g = 0, base = 0; g < G; ++g) {
      const Slab found = slab(t, g);
      const int shift = held ? base - found.first : 0, top = g * p.hidden + this->start(t);
      for (int u = t.id; u < p.share; u += t.count) {
        const bool there = u < this->owned(t);
        int* range = ints(t, p.ranges) + 2 * (g * p.share + u);
        range[0] = there ? starts_above(top + u) + shift : 0, range[1] = there ? s.row_start[top + u + 1] + shift : 0;
      }
      for (int k = found.first + t.id; held && k < found.last; k += t.count) {
        int* index = ints(t, p.index) + 2 * (k + shift);
        index[0] = s.index[2 * k] - top, index[1] = place(s.index[2 * k + 1]);
        for (int i = 0; i < p.block; ++i)
          this->values(t, k + shift)[i] = s.values[static_cast<int64_t>(k) * p.block + i];
      }
      base += found.last - found.first;
    }
  }

  KRUIFY_HD void first_stage(const Thread& t, int step) const {
    products<Exact<4>, AnyShape>(
        t, p.rows * pairs(), p.own, p.P2, p.P1,
        [&](int number, const auto& add) {
          add(at(t, p.a) + number % pairs() * p.own * padded(p.P1), whole(t, step, number / pairs()));
        },
        [&](int number, int p1, int q2, float value) {
          at(t, p.t)[(number * p.own + p1) * padded(p.P2) + q2] = value;
        });
  }
  // gates(gate, row of the batch): the sums of the block's units.
  template <class Gates> KRUIFY_HD void second_stage(const Thread& t, const Gates& gates) const {
    products<Exact<4>, AnyShape>(
        t, p.rows * G, p.own, p.P2, p.P2,
        [&](int number, const auto& add) {
          for (int k = 0; k < p.pair; ++k)
            add(at(t, p.t) + (number * p.pair + k) * p.own * padded(p.P2),
                at(t, p.b) + (number % G * p.pair + k) * p.P2 * padded(p.P2));
        },
        [&](int number, int p1, int p2, float value) { gates(number % G, number / G)[p1 * p.P2 + p2] = value; }, 0,
        [&](int number, int p1, int p2) { return gates(number % G, number / G)[p1 * p.P2 + p2]; });
  }
  template <class Gates> KRUIFY_HD void sparse(const Thread& t, int step, const Gates& gates) const {
    constexpr int N =
        std::is_same_v<Numbers, Exact<1>> ? 1 : 4;  // rows of the batch that share what is read of a block
    const SparseResidual<float>& s = beside.residual;
    const bool held = this->held(t);
    for (int e = t.id; e < G * this->units() / N; e += t.count) {
      const Split of = p.by_share.split(e);
      const int u = of.remainder, g = of.quotient % G, r = of.quotient / G * N, top = g * p.hidden + this->start(t);
      const int first = ints(t, p.ranges)[2 * (g * p.share + u)], last = ints(t, p.ranges)[2 * (g * p.share + u) + 1];
      const float* h = whole(t, step, r);
      float sum[N] = {};
      const auto add = [&](float value, int column) {
        KRUIFY_UNROLL
        for (int i = 0; i < N; ++i) sum[i] += value * h[i * p.stretch + column];
      };
      if (held)
        for (int k = first; k < last; ++k) {
          const int* index = ints(t, p.index) + 2 * k;
          add(this->values(t, k)[u - index[0]], index[1]);
        }
      else
        for (int k = first; k < last; ++k)
          add(s.values[static_cast<int64_t>(k) * p.block + top + u - s.index[2 * k]], place(s.index[2 * k + 1]));
      KRUIFY_UNROLL
      for (int i = 0; i < N; ++i) gates(g, r + i)[u] += sum[i];
    }
  }

  // A unit's new state to every block.
  template <class Block>
  KRUIFY_HD void tell(const Block& block, const Thread& t, int step, int r, int u, float now) const {
    const int to = place(this->start(t) + u);
    for (int rank = 0; rank < t.ranks; ++rank) block.remote(t, rank, whole(t, step, r))[to] = now;
  }
};

template <int G, class Numbers> struct BesideBackward : BesidePhases<G, Numbers> {
  using Base = BesidePhases<G, Numbers>;
  using Base::at, Base::beside, Base::ints, Base::p, Base::padded, Base::pairs;

  // d as the pair reads it, (gates, rows of the batch, own p1, p2), and as the residual does, (gates, rows, units): one
  // float behind each row keeps different rows in different banks.
  KRUIFY_HD float* d(const Thread& t, int g, int r) const {
    return at(t, p.d) + (g * p.rows + r) * p.own * padded(p.P2);
  }
  KRUIFY_HD float* flat(const Thread& t, int g, int r) const {
    return at(t, p.flat) + (g * p.rows + r) * (p.share + 1);
  }
  KRUIFY_HD void keep(const Thread& t, int g, int r, int u, float value) const {
    const Split e = p.by_p2.split(u);
    if (p.pair) d(t, g, r)[e.quotient * padded(p.P2) + e.remainder] = value;
    if (p.blocks) flat(t, g, r)[u] = value;
  }
  // Partial sums of dh, (blocks of the cluster, parts, rows, units).
  KRUIFY_HD float* parts_of(const Thread& t, int step, int rank, int part) const {
    const int buffer = p.cluster > 1 ? step & 1 : 0;
    return at(t, p.back) + ((buffer * p.cluster + rank) * p.parts_of_dh() + part) * this->units();
  }
  KRUIFY_HD void take(const Thread& t, int step) const {
    for (int e = t.id; e < this->units(); e += t.count) {
      float sum = at(t, p.dh)[e];
      for (int rank = 0; rank < t.ranks; ++rank)
        for (int part = 0; part < p.parts_of_dh(); ++part) sum += parts_of(t, step, rank, part)[e];
      at(t, p.dh)[e] = sum;
    }
  }

  KRUIFY_HD void load_beside(const Thread& t) const {
    for (int e = t.id; e < G * this->units(); e += t.count)  // for rows that begin later, and beyond the last unit
      keep(t, e / this->units(), e / p.share % p.rows, e % p.share, 0.0f);
    if (p.pair) {
      load_rows<Exact<4>, true>(t, at(t, p.a), beside.a, pairs(), p.P1, p.P1, t.rank * p.own, p.own);
      load_rows<Exact<4>, true>(t, at(t, p.b), beside.b, pairs(), p.P2, p.P2, 0, p.P2);
    }
    if (p.blocks) {
      int count = 0;
      for (int column = first_column(t); column < first_column(t) + columns(t); ++column)
        each_block(t, column, [&](int64_t, int, int) { ++count; });
      ints(t, p.counts)[t.id] = count;
    }
  }
  // A thread's share of all columns.
  KRUIFY_HD int per_thread(const Thread& t) const { return (p.hidden + t.count - 1) / t.count; }
  KRUIFY_HD int first_column(const Thread& t) const { return static_cast<int>(least(p.hidden, t.id * per_thread(t))); }
  KRUIFY_HD int columns(const Thread& t) const {
    return static_cast<int>(least(per_thread(t), p.hidden - first_column(t)));
  }
  // Calls f(block, gate, its first row from the block's first unit on) for what of a column lies in the own rows.
  template <class F> KRUIFY_HD void each_block(const Thread& t, int column, const F& f) const {
    const SparseResidual<float>& s = beside.residual;
    int low = 0, high = s.blocks;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (s.by_column[middle] < column) low = middle + 1;
      else high = middle;
    }
    for (; low < s.blocks && s.by_column[low] == column; ++low) {
      const int64_t k = s.blocks_by_column[low];
      const int g = s.index[2 * k] / p.hidden, u = s.index[2 * k] % p.hidden - this->start(t);
      if (u > -p.block && u < this->owned(t)) f(k, g, u);
    }
  }
  // Behind a barrier after load_beside. What of a block lies in other rows is 0; none reaches out of the share.
  KRUIFY_HD void load_sparse(const Thread& t) const {
    int next = 0, total = 0;
    for (int k = 0; k < t.count; ++k) {
      const int count = ints(t, p.counts)[k];
      if (k < t.id) next += count;
      total += count;
    }
    if (t.id == 0) ints(t, p.held)[0] = total, ints(t, p.ranges)[p.hidden] = total;
    for (int column = first_column(t); column < first_column(t) + columns(t); ++column) {
      ints(t, p.ranges)[column] = next;
      each_block(t, column, [&](int64_t k, int g, int u) {
        if (total <= p.blocks) {
          const int top = static_cast<int>(least(greatest(u, 0), p.share - p.block));
          ints(t, p.index)[next] = g * p.rows * (p.share + 1) + top;
          for (int i = 0; i < p.block; ++i) {
            const int from = top + i - u;
            const bool own = from >= 0 && from < p.block && top + i < this->owned(t);
            this->values(t, next)[i] = own ? beside.residual.values[k * p.block + from] : 0.0f;
          }
        }
        ++next;
      });
    }
  }

  KRUIFY_HD void first_stage(const Thread& t) const {
    products<Exact<4>, AnyShape>(
        t, p.rows * pairs(), p.own, p.P2, p.P2,
        [&](int number, const auto& add) {
          const int r = number / pairs(), pair = number % pairs();
          add(d(t, pair / p.pair, r), at(t, p.b) + pair * p.P2 * padded(p.P2));
        },
        [&](int number, int p1, int q2, float value) {
          at(t, p.t)[(number * p.P2 + q2) * padded(p.own) + p1] = value;
        });
  }
  template <class Block> KRUIFY_HD void second_stage(const Block& block, const Thread& t, int step) const {
    products<Exact<4>, AnyShape>(
        t, p.rows, p.P1, p.P2, p.own,
        [&](int r, const auto& add) {
          for (int pair = 0; pair < pairs(); ++pair)
            add(at(t, p.a) + pair * p.P1 * padded(p.own), at(t, p.t) + (r * pairs() + pair) * p.P2 * padded(p.own));
        },
        [&](int r, int q1, int q2, float value) { send(block, t, step, 0, r, q1 * p.P2 + q2, value); });
  }
  template <class Block> KRUIFY_HD void sparse(const Block& block, const Thread& t, int step) const {
    const bool held = this->held(t);
    for (int e = t.id; e < p.hidden * p.rows; e += t.count) {
      const Split of = p.by_rows.split(e);  // neighbours read the same blocks
      const int r = of.remainder, column = of.quotient;
      float sum = 0.0f;
      if (held)
        for (int k = ints(t, p.ranges)[column]; k < ints(t, p.ranges)[column + 1]; ++k) {
          const float *value = this->values(t, k), *from = flat(t, 0, r) + ints(t, p.index)[k];
          for (int i = 0; i < p.block; ++i) sum += value[i] * from[i];
        }
      else
        each_block(t, column, [&](int64_t k, int g, int u) {
          for (int i = 0; i < p.block; ++i)
            if (u + i >= 0 && u + i < this->owned(t))
              sum += beside.residual.values[k * p.block + i] * flat(t, g, r)[u + i];
        });
      send(block, t, step, p.pair > 0, r, column, sum);
    }
  }
  template <class Block>
  KRUIFY_HD void send(const Block& block, const Thread& t, int step, int part, int r, int unit, float value) const {
    const Split owner = p.by_share.split(unit);
    float* to = block.remote(t, owner.quotient, parts_of(t, step, t.rank, part));
    to[r * p.share + owner.remainder] = value;
  }
};

}  // namespace kruify::cuda
