// The phases of the low-rank recurrence that both directions have in common, for one block of a cluster.
#pragma once

#include "general.h"
#include "low_rank_plan.h"
#include "parts.h"
#include "rows.h"

namespace kruify::cuda {

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
      const Split of = p.by_share.split(e);
      if (of.remainder < owned(t) && step < length(t, of.quotient)) f(of.quotient, of.remainder, e);
    }
  }
  // A unit's place in the operand of the first product; G of them backward.
  KRUIFY_HD void put(const Thread& t, int number, int numbers, int r, int u, float value) const {
    const Split of = p.by_width.split(u);
    const int slice = of.quotient * numbers + number;
    Numbers::put(at(t, p.in) + (slice * p.rows + r) * words(p.width()), of.remainder, value);
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
      const Split of = p.by_rows.split(e), k = p.by_depth.split(of.quotient);
      Numbers::put(at(t, p.z) + (k.quotient * p.rows + of.remainder) * words(p.depth), k.remainder, sum);
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

}  // namespace kruify::cuda
