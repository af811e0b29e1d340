// The whole forward sequence of some rows of the batch for W[g] = second[g] first[set of g] (LowRank), float32:
//
//   part[k] = sum over the units of slice k: first[k, unit] h[unit]     phase 1
//   sums of the block's parts go to every block of the cluster          phase 2
//   z[k] = sum over the blocks                                          phase 3
//   gate[g][unit] = x + sum_k second[g, unit, k] z[k]                   phase 4
//   h, c = cell(gates)                                                  phase 5
//
// and, with `Sums`, what stands beside (low_rank_beside.h).
// All sums run in one fixed order. `Numbers` as in pair_forward.h.
#pragma once

#include "low_rank_beside.h"

namespace kruify::cuda {

// `x` is 16-byte aligned.
struct LowRankForward : ForwardArrays<float> {
  LowRank<float> low;
  Diagonal<float> diagonal;
  const float* bias;  // (G * H,), or null
  Beside beside;
};

template <int G, class Numbers, bool Sums> struct LowRankForwardPhases : BesideForward<G, Numbers> {
  using Base = BesideForward<G, Numbers>;
  using Base::at, Base::exact, Base::p, Base::words;
  const LowRankForward& args;

  KRUIFY_HD float* x(const Thread& t, int step, int gate, int r) const {
    return at(t, p.x) + (((step & 1) * G + gate) * p.rows + r) * p.share;
  }
  // The GRU's reset gate stands between the two shares of the third gate.
  static KRUIFY_HD bool apart(int gate) { return G == 3 && gate == 2; }

  KRUIFY_HD void load(const Thread& t) const {
    const LowRank<float>& low = args.low;
    const int first = this->start(t), owned = this->owned(t), width = p.width();
    for (int e = t.id; e < p.narrow() * p.share; e += t.count) {
      const int u = e % p.share, z = e / p.share, set = z / p.rank, k = z % p.rank;
      const bool there = u < owned && k < low.rank;
      const float value = there ? low.first[(static_cast<int64_t>(set) * low.rank + k) * p.hidden + first + u] : 0.0f;
      Numbers::put(at(t, p.first) + (u / width * p.narrow() + z) * words(width), u % width, value);
    }
    for (int e = t.id; e < G * p.share * p.rank; e += t.count) {
      const int k = e % p.rank, u = e / p.rank % p.share, gate = e / (p.rank * p.share);
      const bool there = u < owned && k < low.rank;
      const float value = there ? low.second[(static_cast<int64_t>(gate) * p.hidden + first + u) * low.rank + k] : 0.0f;
      Numbers::put(at(t, p.second) + (gate * p.share + u) * words(p.rank), k, value);
    }
    for (int e = t.id; e < this->units(); e += t.count) {
      const int r = e / p.share, u = e % p.share;
      const bool there = u < owned && this->sample + r < args.rows.batch;
      const int64_t from = static_cast<int64_t>(this->sample + r) * p.hidden + first + u;
      const float h = there ? args.h0[from] : 0.0f;
      this->put(t, 0, 1, r, u, h);
      if constexpr (!exact) at(t, p.state)[e] = h;
      if constexpr (G == 4) at(t, p.c)[e] = there ? args.c0[from] : 0.0f;
    }
    for (int e = t.id; e < G * p.share; e += t.count) {
      const int gate = e / p.share, u = e % p.share;
      if (u >= owned) continue;
      if (p.bias >= 0) at(t, p.bias)[e] = args.bias[gate * p.hidden + first + u];
      const float* d = args.diagonal.of(gate, p.hidden);
      if (p.diagonal >= 0) at(t, p.diagonal)[e] = d ? d[first + u] : 0.0f;
    }
    if constexpr (Sums) this->load_beside(t, args.h0);
    this->load_lengths(t);
  }

  // Starts to fetch the input gates of one step.
  KRUIFY_HD void fetch(const Thread& t, int step) const {
    for (int e = t.id; e < G * p.rows * p.by_quads.size; e += t.count) {
      const Split of = p.by_quads.split(e), row = p.by_rows.split(of.quotient);
      const int u = of.remainder * 4, r = row.remainder, gate = row.quotient;
      if (u < this->owned(t) && step < this->length(t, r))
        fetch_quad(
            x(t, step, gate, r) + u, args.x + (this->row(t, step, r) * G + gate) * p.hidden + this->start(t) + u);
    }
    fetch_commit();
  }

  KRUIFY_HD float& state(const Thread& t, int r, int u) const {
    if constexpr (!exact) return at(t, p.state)[r * p.share + u];
    const Split of = p.by_width.split(u);
    return at(t, p.in)[(of.quotient * p.rows + r) * words(p.width()) + of.remainder];
  }
  // The sums of a gate.
  KRUIFY_HD float* gates(const Thread& t, int step, int gate, int r) const {
    return apart(gate) ? at(t, p.y) + r * p.share : x(t, step, gate, r);
  }

  KRUIFY_HD void first_product(const Thread& t) const { this->to_narrow(t, p.slices, p.narrow()); }
  KRUIFY_HD void second_product(const Thread& t, int step) const {
    this->from_narrow(
        t, G, [&](int gate, int r, int u) { return apart(gate) ? 0.0f : x(t, step, gate, r)[u]; },
        [&](int gate, int r, int u) { return gates(t, step, gate, r) + u; });
  }

  // The new state of the block's units; what `store` will need of the gates stands in their place.
  template <class Block> KRUIFY_HD void cell(const Block& block, const Thread& t, int step, bool last) const {
    this->each_unit(t, step, [&](int r, int u, int e) {
      const float before = state(t, r, u);
      float gates[G], product[G], saved[5], c = G == 4 ? at(t, p.c)[e] : 0.0f;
      KRUIFY_UNROLL
      for (int g = 0; g < G; ++g) {
        gates[g] = x(t, step, g, r)[u];
        product[g] = apart(g) ? at(t, p.y)[e] : 0.0f;
        if (p.bias >= 0) product[g] += at(t, p.bias)[g * p.share + u];
        if (p.diagonal >= 0) product[g] += at(t, p.diagonal)[g * p.share + u] * before;
      }
      const float now = cell_forward<G>(gates, product, before, c, args.kind, saved);
      this->put(t, 0, 1, r, u, now);
      if constexpr (!exact) state(t, r, u) = now;
      if (Sums && !last) this->tell(block, t, step + 1, r, u, now);  // later another block may have ended
      if constexpr (G == 4) at(t, p.c)[e] = c;
      if (G > 1 && args.workspace) {
        KRUIFY_UNROLL
        for (int g = 0; g < G; ++g) x(t, step, g, r)[u] = saved[g];
        if constexpr (G == 3) at(t, p.y)[e] = saved[3];
      }
    });
  }

  // The step's results to global memory, by the threads that have them: behind the arrival at the cluster's barrier,
  // which would wait for these stores.
  KRUIFY_HD void store(const Thread& t, int step) const {
    constexpr int kept = saved_of_gates(G);
    this->each_unit(t, step, [&](int r, int u, int e) {
      const int64_t row = this->row(t, step, r), i = this->start(t) + u;
      args.out[row * p.hidden + i] = state(t, r, u);
      if (!args.workspace) return;
      KRUIFY_UNROLL
      for (int k = 0; k < kept; ++k)
        args.workspace[(row * kept + k) * p.hidden + i] = k < G ? x(t, step, k, r)[u] : at(t, G == 4 ? p.c : p.y)[e];
    });
  }

  KRUIFY_HD void finish(const Thread& t) const {
    for (int e = t.id; e < this->units(); e += t.count) {
      const int r = e / p.share, u = e % p.share;
      if (u >= this->owned(t) || this->sample + r >= args.rows.batch) continue;
      const int64_t to = static_cast<int64_t>(this->sample + r) * p.hidden + this->start(t) + u;
      args.h_last[to] = state(t, r, u);
      if constexpr (G == 4) args.c_last[to] = at(t, p.c)[e];
    }
  }
};

template <int G, class Numbers, bool Sums, class Block>
KRUIFY_HD void low_rank_recurrence(Block& block, const LowRankPlan& p, const LowRankForward& args, int sample) {
  const int steps = args.rows.length(sample);  // the longest: lengths descend
  const LowRankForwardPhases<G, Numbers, Sums> phases{{{{p, args.rows, sample}, args.beside}}, args};
  block.each([&](const Thread& t) { phases.load(t); });
  block.cluster_barrier();  // nobody writes into a block that has not started
  block.each([&](const Thread& t) { phases.fetch(t, 0); });
  for (int n = 0; n < steps; ++n) {
    block.each([&](const Thread& t) { phases.first_product(t); });
    block.barrier();
    if (p.cluster > 1) block.each([&, n](const Thread& t) { phases.spread(block, t, n); });
    block.cluster_arrive();
    block.each([&, n](const Thread& t) {
      if (n) phases.store(t, n - 1);
    });
    block.cluster_wait();
    block.each([&, n](const Thread& t) {
      phases.gather(t, n);
      if (Sums && p.pair) phases.first_stage(t, n);
      fetch_wait<0>();
    });
    block.barrier();
    block.each([&, n](const Thread& t) {
      phases.fetch(t, n + 1);
      phases.second_product(t, n);
    });
    block.barrier();
    if constexpr (Sums) {
      if (p.pair) {
        block.each([&, n](const Thread& t) {
          phases.second_stage(t, [&](int gate, int r) { return phases.gates(t, n, gate, r); });
        });
        block.barrier();
      }
      if (p.blocks) {
        block.each([&, n](const Thread& t) {
          phases.sparse(t, n, [&](int gate, int r) { return phases.gates(t, n, gate, r); });
        });
        block.barrier();
      }
    }
    block.each([&, n](const Thread& t) { phases.cell(block, t, n, n + 1 == steps); });
    block.barrier();
  }
  block.each([&](const Thread& t) {
    if (steps) phases.store(t, steps - 1);
    phases.finish(t);
  });
  block.end();
}

}  // namespace kruify::cuda
