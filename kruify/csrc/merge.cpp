// The operators `merge` and `merge_backward`: tiny factors multiplied into stages of a good size.
#include <algorithm>

#include "buffer.h"
#include "factors.h"

namespace kruify {
namespace {

struct Shape {
  int64_t p, q;
};

// out (mp, nq) = a (m, n) (x) b (p, q)
template <class T> void kron(const T* a, Shape sa, const T* b, Shape sb, T* out) {
  for (int64_t i = 0; i < sa.p; ++i)
    for (int64_t k = 0; k < sb.p; ++k)
      for (int64_t j = 0; j < sa.q; ++j) {
        const T s = a[i * sa.q + j];
        for (int64_t l = 0; l < sb.q; ++l) *out++ = s * b[k * sb.q + l];
      }
}

// The two gradients of kron; ga is written, gb is added to.
template <class T> void kron_backward(const T* g, const T* a, Shape sa, const T* b, Shape sb, T* ga, T* gb) {
  const int64_t columns = sa.q * sb.q;
  for (int64_t i = 0; i < sa.p; ++i)
    for (int64_t j = 0; j < sa.q; ++j) {
      T total = 0;
      const T s = a[i * sa.q + j];
      for (int64_t k = 0; k < sb.p; ++k) {
        const T* row = g + (i * sb.p + k) * columns + j * sb.q;
        for (int64_t l = 0; l < sb.q; ++l) {
          total += row[l] * b[k * sb.q + l];
          gb[k * sb.q + l] += row[l] * s;
        }
      }
      ga[i * sa.q + j] = total;
    }
}

// The products of one group's factors, one after the other in memory.
template <class T> class Chain {
 public:
  Chain(const CheckedFactors& f, const CheckedFactors::Group& g) : memory_(size(f, g)) {
    for (size_t k = g.first; k < g.last; ++k) factors_.push_back({data<T>(f.factors[k]), {f.rows(k), f.columns(k)}});
  }
  size_t count() const { return factors_.size(); }
  Shape shape(size_t k) const { return factors_[k].shape; }
  const T* factor(size_t k, int64_t pair) const {
    return factors_[k].data + pair * factors_[k].shape.p * factors_[k].shape.q;
  }
  // The products of the first 1, 2, ... factors of a (gate, rank), one behind the other; returns where the last is.
  T* multiply(int64_t pair) const {
    T* product = memory_.data();
    Shape whole = shape(0);
    std::copy_n(factor(0, pair), whole.p * whole.q, product);
    for (size_t k = 1; k < count(); ++k) {
      T* out = product + whole.p * whole.q;
      kron(product, whole, factor(k, pair), shape(k), out);
      whole = {whole.p * shape(k).p, whole.q * shape(k).q}, product = out;
    }
    return product;
  }

 private:
  struct Factor {
    const T* data;
    Shape shape;
  };
  std::vector<Factor> factors_;
  Buffer<T> memory_;

  static int64_t size(const CheckedFactors& f, const CheckedFactors::Group& g) {
    int64_t total = 0, one = 1;
    for (size_t k = g.first; k < g.last; ++k) total += one = times(one, f.rows(k) * f.columns(k));
    return total;
  }
};

template <class T> std::vector<Tensor> run(const CheckedFactors& f) {
  std::vector<Tensor> stages;
  for (const auto& g : f.groups) {
    const T* scale = stages.empty() ? data<T>(f.scale) : nullptr;
    stages.push_back(f.empty_stage(g));
    T* out = writable<T>(stages.back());
    const int64_t size = g.p * g.q;
    const Chain<T> chain(f, g);
    for (int64_t i = 0; i < f.pairs(); ++i) {
      const T *product = chain.multiply(i), s = scale ? scale[i] : T(1);
      for (int64_t k = 0; k < size; ++k) out[i * size + k] = s * product[k];
    }
  }
  return stages;
}

template <class T> std::vector<Tensor> run_backward(const CheckedFactors& f, const std::vector<Tensor>& grads) {
  std::vector<Tensor> results = f.empty_gradients();
  for (const Tensor& t : results) std::fill_n(writable<T>(t), t.numel(), T(0));
  for (size_t k = 0; k < f.groups.size(); ++k) {
    const auto& g = f.groups[k];
    const int64_t size = g.p * g.q;
    const Chain<T> chain(f, g);
    Buffer<T> first(size), second(size);
    for (int64_t i = 0; i < f.pairs(); ++i) {
      T *product = chain.multiply(i), *grad = first.data(), *next = second.data();
      const T* above = data<T>(grads[k]) + i * size;
      if (k == 0 && f.scale) {
        const T s = data<T>(f.scale)[i];
        T total = 0;
        for (int64_t j = 0; j < size; ++j) total += above[j] * product[j], grad[j] = above[j] * s;
        writable<T>(results.back())[i] = total;
      } else {
        std::copy_n(above, size, grad);
      }
      Shape whole{g.p, g.q};
      for (size_t n = chain.count(); n-- > 1;) {
        const Shape last = chain.shape(n), rest{whole.p / last.p, whole.q / last.q};
        product -= rest.p * rest.q;
        kron_backward(grad, product, rest, chain.factor(n, i), last, next,
            writable<T>(results[g.first + n]) + i * last.p * last.q);
        std::swap(grad, next);
        whole = rest;
      }
      std::copy_n(grad, whole.p * whole.q, writable<T>(results[g.first]) + i * whole.p * whole.q);
    }
  }
  return results;
}

std::vector<Tensor> merge(
    const std::vector<Tensor>& factors, const Optional& scale, const std::vector<int64_t>& groups) {
  const Place place = place_of_factors("merge", factors);
  const CheckedFactors given(factors, scale, groups, place);
  return typed(place, [&](auto zero) { return run<decltype(zero)>(given); });
}

std::vector<Tensor> merge_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& factors,
    const Optional& scale, const std::vector<int64_t>& groups) {
  const Place place = place_of_factors("merge_backward", factors);
  const CheckedFactors given(factors, scale, groups, place);
  const std::vector<Tensor> upper = given.checked_gradients(grads, place);
  return typed(place, [&](auto zero) { return run_backward<decltype(zero)>(given, upper); });
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("merge", TORCH_BOX(&kruify::merge));
  m.impl("merge_backward", TORCH_BOX(&kruify::merge_backward));
}
