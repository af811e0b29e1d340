// The whole backward sequence of some rows of the batch for W[g] = second[g] first[set of g], from the last step to the
// first: the forward pass's phases with the matrices turned round.
//
//   d[g][unit] = gradient of the gates' W h, by the cell's derivative                phase 1
//   part[k] = sum over gates and the units of slice k: second[g, unit, k] d[g, unit]   phase 2
//   z[k] = sum over the blocks                                                       phases 3 and 4
//   dh[unit] = what passed by W + sum_k first[k, unit] z[k]                          phase 5
#pragma once

#include "low_rank_forward.h"

namespace kruify::cuda {

struct LowRankBackward : BackwardArrays<float> {
  LowRank<float> low;
  Diagonal<float> diagonal;
  Beside beside;
};

template <int G, class Numbers, bool Sums> struct LowRankBackwardPhases : BesideBackward<G, Numbers> {
  using Base = BesideBackward<G, Numbers>;
  using Base::at, Base::p, Base::words;
  const LowRankBackward& args;

  KRUIFY_HD void load(const Thread& t) const {
    const LowRank<float>& low = args.low;
    const int first = this->start(t), owned = this->owned(t), width = p.width();
    for (int e = t.id; e < G * p.share * p.rank; e += t.count) {
      const int k = e % p.rank, u = e / p.rank % p.share, gate = e / (p.rank * p.share);
      const bool there = u < owned && k < low.rank;
      const float value = there ? low.second[(static_cast<int64_t>(gate) * p.hidden + first + u) * low.rank + k] : 0.0f;
      Numbers::put(at(t, p.first) + ((u / width * G + gate) * p.rank + k) * words(width), u % width, value);
    }
    for (int e = t.id; e < p.narrow() * p.share; e += t.count) {
      const int u = e % p.share, z = e / p.share, set = z / p.rank, k = z % p.rank;
      const bool there = u < owned && k < low.rank;
      const float value = there ? low.first[(static_cast<int64_t>(set) * low.rank + k) * p.hidden + first + u] : 0.0f;
      Numbers::put(at(t, p.second) + u * words(p.narrow()), z, value);
    }
    for (int e = t.id; e < this->units(); e += t.count) {
      const int r = e / p.share, u = e % p.share;
      const bool there = u < owned && this->sample + r < args.rows.batch;
      const int64_t from = static_cast<int64_t>(this->sample + r) * p.hidden + first + u;
      at(t, p.dh)[e] = there && args.grad_h ? args.grad_h[from] : 0.0f;
      if constexpr (G == 4) at(t, p.c)[e] = there && args.grad_c ? args.grad_c[from] : 0.0f;
      for (int g = 0; g < G; ++g) this->put(t, g, G, r, u, 0.0f);  // for rows that begin later
    }
    if constexpr (Sums) this->load_beside(t);
    this->load_lengths(t);
  }

  KRUIFY_HD void cell(const Thread& t, int step) const {
    this->each_unit(t, step, [&](int r, int u, int e) {
      const int i = this->start(t) + u;
      const int64_t row = this->row(t, step, r), before = step ? this->row(t, step - 1, r) : 0;
      float product[G], c = G == 4 ? at(t, p.c)[e] : 0.0f;
      float carry =
          unit_backward<G>(args, p.hidden, step, row, before, this->sample + r, i, at(t, p.dh)[e], c, product);
      KRUIFY_UNROLL
      for (int g = 0; g < G; ++g) {
        this->put(t, g, G, r, u, product[g]);
        if constexpr (Sums) this->keep(t, g, r, u, product[g]);
        if (const float* d = args.diagonal.of(g, p.hidden)) carry += d[i] * product[g];
      }
      at(t, p.dh)[e] = carry;
      if constexpr (G == 4) at(t, p.c)[e] = c;
    });
  }

  // Asks for what the next step (the one before in time) will read, while the products run.
  KRUIFY_HD void ask(const Thread& t, int step) const {
    if (step < 1) return;
    this->each_unit(t, step, [&](int r, int u, int) {
      if (u % 8) return;  // one request per sector
      constexpr int kept = saved_of_gates(G);
      const int64_t row = this->row(t, step - 1, r), i = this->start(t) + u;
      KRUIFY_UNROLL
      for (int k = 0; k < kept; ++k) prefetch(args.workspace + (row * kept + k) * p.hidden + i);
      if (args.grad_out) prefetch(args.grad_out + row * p.hidden + i);
      if (G < 4) prefetch(args.out + row * p.hidden + i);
    });
  }

  KRUIFY_HD void first_product(const Thread& t) const { this->to_narrow(t, p.slices * G, p.rank); }
  KRUIFY_HD void second_product(const Thread& t) const {
    const auto place = [&](int, int r, int u) { return at(t, p.dh) + r * p.share + u; };
    this->from_narrow(t, 1, [&](int, int r, int u) { return *place(0, r, u); }, place);
  }

  KRUIFY_HD void finish(const Thread& t) const {
    for (int e = t.id; e < this->units(); e += t.count) {
      const int r = e / p.share, u = e % p.share;
      if (u >= this->owned(t) || this->sample + r >= args.rows.batch) continue;
      const int64_t to = static_cast<int64_t>(this->sample + r) * p.hidden + this->start(t) + u;
      args.grad_h0[to] = at(t, p.dh)[e];
      if constexpr (G == 4) args.grad_c0[to] = at(t, p.c)[e];
    }
  }
};

template <int G, class Numbers, bool Sums, class Block>
KRUIFY_HD void low_rank_recurrence(Block& block, const LowRankPlan& p, const LowRankBackward& args, int sample) {
  const int steps = args.rows.length(sample);
  const LowRankBackwardPhases<G, Numbers, Sums> phases{{{{p, args.rows, sample}, args.beside}}, args};
  block.each([&](const Thread& t) { phases.load(t); });
  if (Sums && p.blocks) {
    block.barrier();
    block.each([&](const Thread& t) { phases.load_sparse(t); });
  }
  block.cluster_barrier();
  for (int n = steps - 1; n >= 0; --n) {
    block.each([&, n](const Thread& t) { phases.cell(t, n); });
    block.barrier();
    block.each([&](const Thread& t) {
      phases.first_product(t);
      if (Sums && p.pair) phases.first_stage(t);
    });
    block.barrier();
    if (p.cluster > 1) block.each([&, n](const Thread& t) { phases.spread(block, t, n); });
    if constexpr (Sums)
      block.each([&, n](const Thread& t) {
        if (p.pair) phases.second_stage(block, t, n);
        if (p.blocks) phases.sparse(block, t, n);
      });
    block.cluster_arrive();
    block.each([&, n](const Thread& t) { phases.ask(t, n); });
    block.cluster_wait();
    if (Sums && p.cluster == 1) block.barrier();
    block.each([&, n](const Thread& t) {
      phases.gather(t, n);
      if constexpr (Sums) phases.take(t, n);
    });
    block.barrier();
    block.each([&](const Thread& t) { phases.second_product(t); });
    block.barrier();
  }
  block.each([&](const Thread& t) { phases.finish(t); });
  block.end();
}

}  // namespace kruify::cuda
