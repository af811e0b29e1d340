// The operators `merge` and `merge_backward`: tiny factors multiplied into stages of a good size.
#include <algorithm>

#include "checks.h"

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

// A factor is (gates, rank, P, Q).
int64_t products(const Tensor& f) { return f.size(0) * f.size(1); }
int64_t rows(const Tensor& f) { return f.size(2); }
int64_t columns(const Tensor& f) { return f.size(3); }

struct Group {
  size_t first, last;  // factors [first, last)
  int64_t p, q;
};

std::vector<Group> groups_of(
    const std::vector<Tensor>& factors, const Optional& scale, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(!factors.empty() && !sizes.empty(), "kruify::merge: no factors");
  const auto dtype = floating("merge", factors[0]);
  std::vector<Group> groups;
  size_t next = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(
        size >= 1 && size_t(size) <= factors.size() - next, "kruify::merge: the groups do not cover the factors");
    Group g{next, next + size_t(size), 1, 1};
    for (; next < g.last; ++next) {
      const Tensor& f = factors[next];
      const bool fits = f.is_cpu() && f.scalar_type() == dtype && f.dim() == 4 && f.size(0) == factors[0].size(0) &&
          f.size(1) == factors[0].size(1);
      STD_TORCH_CHECK(
          fits, "kruify::merge: every factor must have shape (gates, rank, P, Q), with the same gates, rank and dtype");
      g.p = times(g.p, rows(f)), g.q = times(g.q, columns(f));
    }
    times(times(g.p, g.q), products(factors[0]));
    groups.push_back(g);
  }
  STD_TORCH_CHECK(next == factors.size(), "kruify::merge: the groups do not cover the factors");
  if (scale)
    STD_TORCH_CHECK(scale->dim() == 2 && scale->is_cpu() && scale->scalar_type() == dtype &&
            scale->size(0) == factors[0].size(0) && scale->size(1) == factors[0].size(1),
        "kruify::merge: the scale must have shape (gates, rank) and the factors' dtype");
  return groups;
}

std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> all;
  for (const Tensor& t : tensors) all.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return all;
}

// The products of the first 1, 2, ... factors of a group, one after the other in `memory`; returns where the last is.
template <class T> T* chain(const std::vector<Tensor>& factors, const Group& g, int64_t product, T* memory) {
  Shape shape{rows(factors[g.first]), columns(factors[g.first])};
  std::copy_n(pointer<T>(factors[g.first]) + product * shape.p * shape.q, shape.p * shape.q, memory);
  for (size_t f = g.first + 1; f < g.last; ++f) {
    const Shape next{rows(factors[f]), columns(factors[f])};
    T* out = memory + shape.p * shape.q;
    kron(memory, shape, pointer<T>(factors[f]) + product * next.p * next.q, next, out);
    shape = {shape.p * next.p, shape.q * next.q};
    memory = out;
  }
  return memory;
}

int64_t chain_size(const std::vector<Tensor>& factors, const Group& g) {
  int64_t total = 0, size = 1;
  for (size_t f = g.first; f < g.last; ++f) total += size = times(size, rows(factors[f]) * columns(factors[f]));
  return total;
}

template <class T>
std::vector<Tensor> run(
    const std::vector<Tensor>& given, const Optional& scale_given, const std::vector<int64_t>& sizes) {
  const std::vector<Group> groups = groups_of(given, scale_given, sizes);
  const std::vector<Tensor> factors = contiguous(given);
  Optional scale;
  if (scale_given) scale = contiguous({*scale_given})[0];
  const int64_t n = products(factors[0]);
  std::vector<Tensor> stages;
  for (const Group& g : groups) {
    Tensor stage = empty_like(factors[0], {factors[0].size(0), factors[0].size(1), g.p, g.q});
    T* out = mutable_pointer<T>(stage);
    const int64_t size = g.p * g.q;
    Buffer<T> memory(chain_size(factors, g));
    for (int64_t i = 0; i < n; ++i) {
      const T* from = chain(factors, g, i, memory.data());
      const T s = scale && stages.empty() ? pointer<T>(*scale)[i] : T(1);
      for (int64_t k = 0; k < size; ++k) out[i * size + k] = s * from[k];
    }
    stages.push_back(stage);
  }
  return stages;
}

template <class T>
std::vector<Tensor> run_backward(const std::vector<Tensor>& grads_given, const std::vector<Tensor>& given,
    const Optional& scale_given, const std::vector<int64_t>& sizes) {
  const std::vector<Group> groups = groups_of(given, scale_given, sizes);
  STD_TORCH_CHECK(grads_given.size() == groups.size(), "kruify::merge_backward: one gradient a stage");
  std::vector<Tensor> all = given, results;
  if (scale_given) all.push_back(*scale_given);
  for (size_t k = 0; k < groups.size(); ++k)
    checked("a stage's gradient", grads_given[k], given[0].scalar_type(), given[0].size(0), given[0].size(1),
        groups[k].p, groups[k].q);
  const std::vector<Tensor> factors = contiguous(all), grads = contiguous(grads_given);
  for (const Tensor& t : factors) {
    results.push_back(empty_as(t));
    std::fill_n(mutable_pointer<T>(results.back()), t.numel(), T(0));
  }
  const int64_t n = products(given[0]);
  for (size_t k = 0; k < groups.size(); ++k) {
    const Group& g = groups[k];
    const int64_t size = g.p * g.q;
    Buffer<T> memory(chain_size(factors, g)), first(size), second(size);
    for (int64_t i = 0; i < n; ++i) {
      T *product = chain(factors, g, i, memory.data()), *grad = first.data(), *next = second.data();
      const T* above = pointer<T>(grads[k]) + i * size;
      if (k == 0 && scale_given) {
        const T s = pointer<T>(factors.back())[i];
        T total = 0;
        for (int64_t j = 0; j < size; ++j) total += above[j] * product[j], grad[j] = above[j] * s;
        mutable_pointer<T>(results.back())[i] = total;
      } else {
        std::copy_n(above, size, grad);
      }
      Shape whole{g.p, g.q};
      for (size_t f = g.last; f-- > g.first + 1;) {
        const Shape last{rows(factors[f]), columns(factors[f])}, rest{whole.p / last.p, whole.q / last.q};
        product -= rest.p * rest.q;
        kron_backward(grad, product, rest, pointer<T>(factors[f]) + i * last.p * last.q, last, next,
            mutable_pointer<T>(results[f]) + i * last.p * last.q);
        std::swap(grad, next);
        whole = rest;
      }
      std::copy_n(grad, whole.p * whole.q, mutable_pointer<T>(results[g.first]) + i * whole.p * whole.q);
    }
  }
  return results;
}

std::vector<Tensor> merge(
    const std::vector<Tensor>& factors, const Optional& scale, const std::vector<int64_t>& groups) {
  STD_TORCH_CHECK(!factors.empty(), "kruify::merge: no factors");
  const bool single = floating("merge", factors[0]) == torch::headeronly::ScalarType::Float;
  return (single ? &run<float> : &run<double>)(factors, scale, groups);
}

std::vector<Tensor> merge_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& factors,
    const Optional& scale, const std::vector<int64_t>& groups) {
  STD_TORCH_CHECK(!factors.empty(), "kruify::merge_backward: no factors");
  const bool single = floating("merge_backward", factors[0]) == torch::headeronly::ScalarType::Float;
  return (single ? &run_backward<float> : &run_backward<double>)(grads, factors, scale, groups);
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("merge", TORCH_BOX(&kruify::merge));
  m.impl("merge_backward", TORCH_BOX(&kruify::merge_backward));
}
