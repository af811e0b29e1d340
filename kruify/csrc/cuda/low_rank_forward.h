// The whole forward sequence of some rows of the batch for W[g] = second[g] first[set of g] (LowRank), float32:
//
//   part[k] = sum over the units of slice k: first[k, unit] h[unit]     phase 1
//   sums of the block's parts go to every block of the cluster          phase 2
//   z[k] = sum over the blocks                                          phase 3
//   gate[g][unit] = x + sum_k second[g, unit, k] z[k]                   phase 4
//   h, c = cell(gates)                                                  phase 5
//
// All sums run in one fixed order. `Numbers` as in pair_forward.h.
#pragma once

#include "general.h"
#include "low_rank_plan.h"
#include "parts.h"
#include "rows.h"

namespace kruify::cuda {

// `x` is 16-byte aligned.
struct LowRankForward : ForwardArrays<float> {
  LowRank<float> low;
  Diagonal<float> diagonal;
  const float* bias;  // (G * H,), or null
};

// What both directions have in common.
template <class Numbers> struct LowRankPhases {
  static constexpr bool exact = Numbers::precision == kFloat32;
  const LowRankPlan& p;
  const Rows& all;
  int sample;  // the first of the cluster's rows

  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }
  static KRUIFY_HD int words(int n) { return row_words(Numbers::precision, n); }
  KRUIFY_HD int units() const { return p.rows * p.share; }
  // Steps of one of the rows, 0 for one that the batch does not have.
  KRUIFY_HD int& length(const Thread& t, int row) const { return reinterpret_cast<int*>(at(t, p.lengths))[row]; }
  KRUIFY_HD int start(const Thread& t) const { return t.rank * p.share; }  // the block's first unit
  KRUIFY_HD int owned(const Thread& t) const {
    return static_cast<int>(greatest(0, least(p.share, p.hidden - start(t))));
  }
  KRUIFY_HD int64_t row(const Thread& t, int step, int r) const { return all.row(step, sample + r, length(t, r)); }

  KRUIFY_HD void load_lengths(const Thread& t) const {
    for (int r = t.id; r < p.rows; r += t.count) length(t, r) = sample + r < all.batch ? all.length(sample + r) : 0;
  }
  // Calls f(row, unit, element) for the units of the block that take part in this step.
  template <class F> KRUIFY_HD void each_unit(const Thread& t, int step, const F& f) const {
    for (int e = t.id; e < units(); e += t.count) {
      const int r = e / p.share, u = e % p.share;
      if (u < owned(t) && step < length(t, r)) f(r, u, e);
    }
  }
  // A unit's place in the operand of the first product; G of them backward.
  KRUIFY_HD void put(const Thread& t, int number, int numbers, int r, int u, float value) const {
    const int slice = u / p.width() * numbers + number;
    Numbers::put(at(t, p.in) + (slice * p.rows + r) * words(p.width()), u % p.width(), value);
  }

  template <class Block> KRUIFY_HD void spread(const Block& block, const Thread& t, int step) const {
    const int size = p.narrow() * p.rows;
    for (int e = t.id; e < size; e += t.count) {
      const float sum = of_block(t, e);
      for (int rank = 0; rank < t.ranks; ++rank)
        block.remote(t, rank, at(t, p.parts))[((step & 1) * t.ranks + t.rank) * size + e] = sum;
    }
  }
  KRUIFY_HD void gather(const Thread& t, int step) const {
    const int size = p.narrow() * p.rows;
    for (int e = t.id; e < size; e += t.count) {
      float sum = 0.0f;
      if (t.ranks == 1) sum = of_block(t, e);
      else
        for (int rank = 0; rank < t.ranks; ++rank) sum += at(t, p.parts)[((step & 1) * t.ranks + rank) * size + e];
      const int k = e / p.rows, r = e % p.rows;
      Numbers::put(at(t, p.z) + (k / p.depth * p.rows + r) * words(p.depth), k % p.depth, sum);
    }
  }
  KRUIFY_HD float of_block(const Thread& t, int e) const {
    float sum = 0.0f;
    for (int k = 0; k < p.partial; ++k) sum += at(t, p.part)[k * p.narrow() * p.rows + e];
    return sum;
  }

  // The first product of `count` slices (and gates), `rows` numbers of the narrow vector each.
  KRUIFY_HD void to_narrow(const Thread& t, int count, int rows) const {
    products<Numbers, AnyShape>(
        t, count, rows, p.rows, p.width(),
        [&](int number, const auto& add) {
          add(at(t, p.first) + number * rows * words(p.width()), at(t, p.in) + number * p.rows * words(p.width()));
        },
        [&](int number, int k, int r, auto... values) {
          write_values(at(t, p.part) + (number * rows + k) * p.rows + r, false, values...);
        });
  }
  // The second product: to(number, row of the batch, unit) gets its sum, which starts from start(...) of the same.
  template <class Start, class To>
  KRUIFY_HD void from_narrow(const Thread& t, int count, const Start& start, const To& to) const {
    products<Numbers, AnyShape>(
        t, count, p.share, p.rows, p.depth,
        [&](int number, const auto& add) {
          const int set = p.narrow() == p.depth ? 0 : number;
          add(at(t, p.second) + number * p.share * words(p.depth), at(t, p.z) + set * p.rows * words(p.depth));
        },
        [&](int number, int u, int r, auto... values) { ((*to(number, r++, u) = values), ...); }, 0,
        [&](int number, int u, int r) { return start(number, r, u); });
  }
};

template <int G, class Numbers> struct LowRankForwardPhases : LowRankPhases<Numbers> {
  using Base = LowRankPhases<Numbers>;
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
    this->load_lengths(t);
  }

  // Starts to fetch the input gates of one step.
  KRUIFY_HD void fetch(const Thread& t, int step) const {
    const int quads = p.share / 4;
    for (int e = t.id; e < G * p.rows * quads; e += t.count) {
      const int u = e % quads * 4, r = e / quads % p.rows, gate = e / (quads * p.rows);
      if (u < this->owned(t) && step < this->length(t, r))
        fetch_quad(
            x(t, step, gate, r) + u, args.x + (this->row(t, step, r) * G + gate) * p.hidden + this->start(t) + u);
    }
    fetch_commit();
  }

  KRUIFY_HD float& state(const Thread& t, int r, int u) const {
    const int width = p.width();
    return exact ? at(t, p.in)[(u / width * p.rows + r) * words(width) + u % width] : at(t, p.state)[r * p.share + u];
  }

  KRUIFY_HD void first_product(const Thread& t) const { this->to_narrow(t, p.slices, p.narrow()); }
  KRUIFY_HD void second_product(const Thread& t, int step) const {
    this->from_narrow(
        t, G, [&](int gate, int r, int u) { return apart(gate) ? 0.0f : x(t, step, gate, r)[u]; },
        [&](int gate, int r, int u) { return (apart(gate) ? at(t, p.y) + r * p.share : x(t, step, gate, r)) + u; });
  }

  // The new state of the block's units; what `store` will need of the gates stands in their place.
  KRUIFY_HD void cell(const Thread& t, int step) const {
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

template <int G, class Numbers, class Block>
KRUIFY_HD void low_rank_recurrence(Block& block, const LowRankPlan& p, const LowRankForward& args, int sample) {
  const int steps = args.rows.length(sample);  // the longest: lengths descend
  const LowRankForwardPhases<G, Numbers> phases{{p, args.rows, sample}, args};
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
      fetch_wait<0>();
    });
    block.barrier();
    block.each([&, n](const Thread& t) {
      phases.fetch(t, n + 1);
      phases.second_product(t, n);
    });
    block.barrier();
    block.each([&, n](const Thread& t) { phases.cell(t, n); });
    block.barrier();
  }
  block.each([&](const Thread& t) {
    if (steps) phases.store(t, steps - 1);
    phases.finish(t);
  });
  block.end();
}

}  // namespace kruify::cuda
