// The factors of `merge`, checked: consecutive ones make one stage per group.
#pragma once

#include "arguments.h"

namespace kruify {

struct CheckedFactors {
  struct Group {
    size_t first, last;  // factors [first, last)
    int64_t p, q;
  };
  std::vector<Tensor> factors;  // (gates, rank, P, Q)
  Optional scale;               // (gates, rank), on the first group
  std::vector<Group> groups;
  int64_t gates, rank;

  CheckedFactors(const std::vector<Tensor>& given, const Optional& scale_given, const std::vector<int64_t>& sizes,
      const Place& place) {
    STD_TORCH_CHECK(given[0].dim() == 4 && !sizes.empty(), "kruify::merge: factors have shape (gates, rank, P, Q)");
    gates = given[0].size(0), rank = given[0].size(1);
    for (const Tensor& f : given) factors.push_back(checked("a factor", f, place, gates, rank, -1, -1));
    scale = checked("the scale", scale_given, place, gates, rank);
    size_t next = 0;
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(
          size >= 1 && size_t(size) <= factors.size() - next, "kruify::merge: the groups do not cover the factors");
      Group g{next, next + size_t(size), 1, 1};
      for (; next < g.last; ++next) g.p = times(g.p, rows(next)), g.q = times(g.q, columns(next));
      times(times(g.p, g.q), pairs());
      groups.push_back(g);
    }
    STD_TORCH_CHECK(next == factors.size(), "kruify::merge: the groups do not cover the factors");
  }
  int64_t pairs() const { return gates * rank; }
  int64_t rows(size_t f) const { return factors[f].size(2); }
  int64_t columns(size_t f) const { return factors[f].size(3); }

  Tensor empty_stage(const Group& g) const { return empty(factors[0], {gates, rank, g.p, g.q}); }
  // Of the factors, then of the scale.
  std::vector<Tensor> empty_gradients() const {
    std::vector<Tensor> grads;
    for (const Tensor& f : factors) grads.push_back(empty(f));
    if (scale) grads.push_back(empty(*scale));
    return grads;
  }
  // The gradients of the stages, contiguous.
  std::vector<Tensor> checked_gradients(const std::vector<Tensor>& given, const Place& place) const {
    STD_TORCH_CHECK(given.size() == groups.size(), "kruify::merge_backward: ", groups.size(), " stages have ",
        given.size(), " gradients");
    std::vector<Tensor> grads;
    for (size_t k = 0; k < groups.size(); ++k)
      grads.push_back(checked("a stage's gradient", given[k], place, gates, rank, groups[k].p, groups[k].q));
    return grads;
  }
};

inline Place place_of_factors(const char* op, const std::vector<Tensor>& factors) {
  STD_TORCH_CHECK(!factors.empty(), "kruify::", op, ": no factors");
  return place_of(op, factors[0]);
}

}  // namespace kruify
