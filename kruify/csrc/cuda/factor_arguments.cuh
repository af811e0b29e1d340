// The factors of `merge`, checked, and what is made of them.
#pragma once

#include "arguments.cuh"

namespace kruify::cuda {

// Factors (gates, rank, P, Q); a pair is one (gate, rank).
struct FactorArguments {
  std::vector<Tensor> factors, scale;
  std::vector<size_t> first{0};  // of each group
  int64_t gates, rank;

  FactorArguments(const std::vector<Tensor>& given, const Optional& scale_given, const std::vector<int64_t>& groups) {
    STD_TORCH_CHECK(!given.empty() && !groups.empty(), "kruify: no factors");
    const Tensor& like = given[0];
    STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float || like.scalar_type() == ScalarType::Double,
        "kruify: the kernels take float32 and float64");
    STD_TORCH_CHECK(like.dim() == 4, "kruify: a factor must have 4 dimensions (gates, rank, P, Q), got ", like.dim());
    gates = like.size(0), rank = like.size(1);
    for (const Tensor& f : given) factors.push_back(checked("a factor", f, like, {gates, rank, -1, -1}));
    if (scale_given) scale.push_back(checked("the scale", *scale_given, like, {gates, rank}));
    for (int64_t size : groups) {
      STD_TORCH_CHECK(size > 0 && size <= static_cast<int64_t>(given.size() - first.back()),
          "kruify: the groups do not cover the factors");
      first.push_back(first.back() + size);
      STD_TORCH_CHECK(
          size + !scale.empty() <= kMaxFactors, "kruify: more than ", kMaxFactors - 1, " factors in one stage");
      int64_t elements = pairs();
      for (size_t k = first[first.size() - 2]; k < first.back(); ++k) {
        STD_TORCH_CHECK(factors[k].numel() > 0, "kruify: factor ", k, " is empty");
        elements *= rows(k) * columns(k);
        STD_TORCH_CHECK(elements < (int64_t{1} << 31), "kruify: a stage would have ", elements, " elements");
      }
    }
    STD_TORCH_CHECK(first.back() == given.size(), "kruify: the groups do not cover the factors");
  }
  int64_t pairs() const { return gates * rank; }
  int64_t rows(size_t k) const { return factors[k].size(2); }
  int64_t columns(size_t k) const { return factors[k].size(3); }
  size_t groups() const { return first.size() - 1; }

  template <class T> Chain<T> chain(size_t group) const {
    Chain<T> chain{};
    chain.pairs = static_cast<int>(pairs());
    for (size_t k = first[group]; k < first[group + 1]; ++k) chain.add(data<T>(factors[k]), rows(k), columns(k));
    if (group == 0 && !scale.empty()) chain.add(data<T>(scale[0]), 1, 1);
    return chain;
  }
  // The stages, (gates, rank, rows, columns).
  std::vector<Tensor> merged(Machine& machine) const {
    std::vector<Tensor> stages;
    for (size_t g = 0; g < groups(); ++g)
      typed(factors[0], [&](auto zero) {
        using T = decltype(zero);
        const Chain<T> one = chain<T>(g);
        stages.push_back(empty(factors[0], {gates, rank, one.rows, one.cols}));
        machine.run(MergeChain<T>{one, writable<T>(stages.back())});
      });
    return stages;
  }
  // Gradients of the factors, then of the scale.
  std::vector<Tensor> backward(Machine& machine, const std::vector<Tensor>& grads) const {
    std::vector<Tensor> found;
    for (const Tensor& f : factors) found.push_back(empty(f, {f.sizes().begin(), f.sizes().end()}));
    for (const Tensor& f : scale) found.push_back(empty(f, {f.sizes().begin(), f.sizes().end()}));
    STD_TORCH_CHECK(grads.size() == groups(), "kruify: ", groups(), " stages have ", grads.size(), " gradients");
    for (size_t g = 0; g < groups(); ++g)
      typed(factors[0], [&](auto zero) {
        using T = decltype(zero);
        const Chain<T> one = chain<T>(g);
        STD_TORCH_CHECK(grads[g].dim() == 4, "kruify: the gradient of a stage must have 4 dimensions");
        const Tensor grad = checked("the gradient of a stage", grads[g], factors[0], {gates, rank, one.rows, one.cols});
        std::vector<T*> to;
        for (size_t k = first[g]; k < first[g + 1]; ++k) to.push_back(writable<T>(found[k]));
        if (g == 0 && !scale.empty()) to.push_back(writable<T>(found.back()));
        chain_backward(machine, one, data<T>(grad), to);
      });
    return found;
  }
};

}  // namespace kruify::cuda
