// The shapes that have templates of their own, and how a call picks one. Balanced pairs of 256 .. 4096 hidden units.
#pragma once

#include <type_traits>

#include "low_rank_plan.h"
#include "pair_plan.h"

#ifndef KRUIFY_FIXED_SHAPES
#define KRUIFY_FIXED_SHAPES(_) _(16, 16) _(32, 16) _(32, 32) _(64, 32) _(64, 64)
#endif

namespace kruify::cuda {

// Calls f(shape) with the fixed shape where there is one, else with the sizes as they are.
template <class F> void with_shape(AnyShape s, const F& f) {
  [[maybe_unused]] const bool square = s.P1 == s.Q1 && s.P2 == s.Q2;
#define KRUIFY_ENTRY(rows1, rows2) \
  if (square && s.P1 == rows1 && s.P2 == rows2) return f(Square<rows1, rows2>{});
  KRUIFY_FIXED_SHAPES(KRUIFY_ENTRY)
#undef KRUIFY_ENTRY
  f(s);
}

template <class F> void with_gates(Kind kind, const F& f) {
  if (kind == kLstm) f(std::integral_constant<int, 4>{});
  else if (kind == kGru) f(std::integral_constant<int, 3>{});
  else f(std::integral_constant<int, 1>{});
}

// How a plan keeps its operands. The two halves are compiled apart.
template <bool Tensor, class F> void with_numbers(const PairPlan& p, const F& f) {
  if constexpr (Tensor) {
    if (p.precision == kTf32) f(Tf32{});
    else f(Bf16{});
  } else {
    if (p.tile == 4) f(Exact<4>{});
    else f(Exact<2>{});
  }
}

// The kernels over many rows have tiles of four columns alone.
template <class F> void with_precision(Precision precision, const F& f) {
  if (precision == kTf32) f(Tf32{});
  else if (precision == kBf16) f(Bf16{});
  else f(Exact<4>{});
}

// The low-rank recurrence has a column for each row of the batch; with `Sums` it is computed in float32 alone.
template <bool Sums, class F> void with_columns(const LowRankPlan& p, const F& f) {
  if (p.precision == kFloat32 && p.rows == 1) f(Exact<1>{});
  else if constexpr (Sums) f(Exact<4>{});
  else with_precision(p.precision, f);
}

// Calls f(gates, numbers, shape) with the template of a recurrence.
template <bool Tensor, class F> void with_template(AnyShape s, const PairPlan& p, Kind kind, const F& f) {
  with_shape(s, [&](auto shape) {
    with_gates(kind, [&](auto gates) { with_numbers<Tensor>(p, [&](auto numbers) { f(gates, numbers, shape); }); });
  });
}

}  // namespace kruify::cuda
