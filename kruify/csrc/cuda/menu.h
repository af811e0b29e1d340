// The shapes that have templates of their own, and how a call picks one. Balanced pairs of 256 .. 4096 hidden units.
#pragma once

#include "pair_plan.h"

#define KRUIFY_CUDA_MENU(_) _(16, 16) _(32, 16) _(32, 32) _(64, 32) _(64, 64)

namespace kruify::cuda {

// Calls f(shape) with the fixed shape where the menu has it, else with the sizes as they are.
template <class F>
void with_shape(AnyShape s, bool menu, const F& f) {
  const bool square = s.P1 == s.Q1 && s.P2 == s.Q2;
#define KRUIFY_ENTRY(rows1, rows2) \
  if (menu && square && s.P1 == rows1 && s.P2 == rows2) return f(Square<rows1, rows2>{});
  KRUIFY_CUDA_MENU(KRUIFY_ENTRY)
#undef KRUIFY_ENTRY
  f(s);
}

}  // namespace kruify::cuda
