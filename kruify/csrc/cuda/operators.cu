// The operators on CUDA tensors: check, allocate, and run schedule.h on the current stream.
#include "../factors.h"
#include "../operators.h"
#include "chain.h"
#include "machine.cuh"

namespace kruify::cuda {

namespace {

template <class T> MatrixGradient<T> gradient_of(const Matrix<T>& m, const std::vector<Tensor>& grads) {
  MatrixGradient<T> to;
  auto next = grads.begin();
  for (const Term<T>& term : m)
    for (int f = 0; f < term.stages; ++f) to.stages.push_back(writable<T>(*next++));
  if (m.diagonal) to.diagonal = writable<T>(*next++);
  if (m.residual.values) to.residual = writable<T>(*next);
  if (m.bias) to.bias = writable<T>(grads.back());
  return to;
}

// Runs f(machine, matrix) where the tensors are.
template <class T, class F> void on_device(const Tensor& like, const CheckedMatrix<T>& given, const F& f) {
  Machine machine(like);
  machine.residual_index = given.index();
  Matrix<T> m = given.matrix;
  f(machine, m);
}

Tensor product_operator(const Tensor& x_given, const MatrixTensors& given, Precision precision) {
  const Place place = place_of("kron_matmul", x_given);
  return typed(place, [&](auto zero) {
    using T = decltype(zero);
    const CheckedMatrix<T> w(given, place);
    const int64_t rows = rows_of("x", x_given, place, w.matrix.cols);
    const Tensor x = as_contiguous(x_given);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = height_of(w.matrix);
    Tensor y = empty(x, shape.data(), x.dim());
    on_device(x, w,
        [&](Machine& machine, Matrix<T>& m) { product(machine, m, data<T>(x), rows, writable<T>(y), precision); });
    return y;
  });
}

ProductGradients product_backward_operator(
    const Tensor& grad_given, const Tensor& x_given, const MatrixTensors& given, Precision precision) {
  const Place place = place_of("kron_matmul_backward", x_given);
  return typed(place, [&](auto zero) -> ProductGradients {
    using T = decltype(zero);
    const CheckedMatrix<T> w(given, place);
    const int64_t rows = rows_of("x", x_given, place, w.matrix.cols);
    STD_TORCH_CHECK(rows_of("the gradient", grad_given, place, height_of(w.matrix)) == rows,
        "kruify::kron_matmul_backward: x and the gradient have another number of rows");
    const Tensor x = as_contiguous(x_given), grad = as_contiguous(grad_given);
    Tensor grad_x = empty(x);
    std::vector<Tensor> grads = w.empty_gradients();
    on_device(x, w, [&](Machine& machine, Matrix<T>& m) {
      product_transposed(machine, m, data<T>(grad), rows, writable<T>(grad_x), precision);
      product_gradients(machine, m, data<T>(grad), data<T>(x), rows, gradient_of(m, grads), precision);
    });
    return {grad_x, grads};
  });
}

// The packed rows of a call. What the device needs of batch_sizes travels in the parameters of a launch.
Rows rows_on(Machine& machine, const Sequences& call, bool reverse) {
  STD_TORCH_CHECK(
      call.rows() < (int64_t{1} << 31) && call.steps < (int64_t{1} << 31) && call.batch < (int64_t{1} << 27),
      "kruify: ", call.rows(), " rows are too many for one call");
  const int* starts = nullptr;
  if (call.rows() != call.steps * call.batch) starts = machine.upload({call.starts.begin(), call.starts.end()});
  return {starts, static_cast<int>(call.steps), static_cast<int>(call.batch), reverse};
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

States recurrence_operator(const ForwardTensors& given) {
  const Place place = place_of("recurrence", given.x);
  return typed(place, [&](auto zero) -> States {
    using T = decltype(zero);
    const CheckedMatrix<T> w(given.matrix, place, rows_per_bias(given.kind));
    const ForwardCall call(given, w.matrix, place);
    on_device(call.x, w, [&](Machine& machine, Matrix<T>& m) {
      Optional bias = call.bias_ih;
      if (call.w_ih && m.bias && given.kind != kGru && !is_modrelu(given.kind)) {
        // No step then reads a bias: but for the GRU's third gate it is added where that of the input is.
        bias = empty(call.h0, {call.width});
        machine.run(AddBias<T>{m.bias, data<T>(call.bias_ih), writable<T>(*bias), 1, call.width});
        m.bias = nullptr;
      }
      const Tensor gates = call.w_ih ? linear(call.x, *call.w_ih, bias) : call.x;
      const T* x = data<T>(gates);
      if (!call.w_ih && call.bias_ih) {
        T* sum = machine.scratch<T>(call.rows() * call.width);
        machine.run(AddBias<T>{x, data<T>(call.bias_ih), sum, call.rows(), call.width});
        x = sum;
      }
      const ForwardArrays<T> arrays{.x = x,
          .h0 = data<T>(call.h0),
          .c0 = data<T>(call.c0),
          .out = writable<T>(call.out),
          .h_last = writable<T>(call.h),
          .c_last = writable<T>(call.c),
          .workspace = given.training ? writable<T>(call.workspace) : nullptr,
          .rows = rows_on(machine, call, given.reverse)};
      recurrence(machine, m, given.kind, arrays, call.starts, given.precision);
    });
    return {call.out, call.h, call.c, call.workspace};
  });
}

StateGradients recurrence_backward_operator(const BackwardTensors& given) {
  const Place place = place_of("recurrence_backward", given.out);
  return typed(place, [&](auto zero) -> StateGradients {
    using T = decltype(zero);
    const CheckedMatrix<T> w(given.matrix, place, rows_per_bias(given.kind));
    const BackwardCall call(given, w.matrix, place);
    Tensor grad_gates = empty(call.out, {call.rows(), call.width});
    std::vector<Tensor> grads = w.empty_gradients();
    on_device(call.out, w, [&](Machine& machine, Matrix<T>& m) {
      const BackwardArrays<T> arrays{.grad_out = data<T>(call.grad_out),
          .grad_h = data<T>(call.grad_h),
          .grad_c = data<T>(call.grad_c),
          .out = data<T>(call.out),
          .workspace = data<T>(call.workspace),
          .h0 = data<T>(call.h0),
          .c0 = data<T>(call.c0),
          .grad_gates = writable<T>(grad_gates),
          .grad_h0 = writable<T>(call.grad_h0),
          .grad_c0 = writable<T>(call.grad_c0),
          .rows = rows_on(machine, call, given.reverse)};
      recurrence_backward(machine, m, given.kind, arrays, call.starts, gradient_of(m, grads), given.precision);
    });
    return {grad_gates, call.grad_h0, call.grad_c0, grads};
  });
}

// The factors of group `k` of `merge`, with the scale as one more of the first.
template <class T> Chain<T> chain_of(const CheckedFactors& f, size_t k) {
  const auto& g = f.groups[k];
  const bool scaled = k == 0 && f.scale;
  STD_TORCH_CHECK(
      g.last - g.first + scaled <= kMaxFactors, "kruify: more than ", kMaxFactors - 1, " factors in one stage");
  Chain<T> chain{};
  chain.pairs = static_cast<int>(f.pairs());
  int64_t elements = f.pairs();
  for (size_t n = g.first; n < g.last; ++n) {
    elements *= f.rows(n) * f.columns(n);
    STD_TORCH_CHECK(
        elements > 0 && elements < (int64_t{1} << 31), "kruify: a stage would have ", elements, " elements");
    chain.add(data<T>(f.factors[n]), f.rows(n), f.columns(n));
  }
  if (scaled) chain.add(data<T>(*f.scale), 1, 1);
  return chain;
}

std::vector<Tensor> merge(
    const std::vector<Tensor>& factors, const Optional& scale, const std::vector<int64_t>& groups) {
  const Place place = place_of_factors("merge", factors);
  const CheckedFactors given(factors, scale, groups, place);
  std::vector<Tensor> stages;
  typed(place, [&](auto zero) {
    using T = decltype(zero);
    Machine machine(factors[0]);
    for (size_t k = 0; k < given.groups.size(); ++k) {
      const Chain<T> chain = chain_of<T>(given, k);
      stages.push_back(given.empty_stage(given.groups[k]));
      machine.run(MergeChain<T>{chain, writable<T>(stages.back())});
    }
  });
  return stages;
}

std::vector<Tensor> merge_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& factors,
    const Optional& scale, const std::vector<int64_t>& groups) {
  const Place place = place_of_factors("merge_backward", factors);
  const CheckedFactors given(factors, scale, groups, place);
  const std::vector<Tensor> upper = given.checked_gradients(grads, place), found = given.empty_gradients();
  typed(place, [&](auto zero) {
    using T = decltype(zero);
    Machine machine(factors[0]);
    for (size_t k = 0; k < given.groups.size(); ++k) {
      std::vector<T*> to;
      for (size_t n = given.groups[k].first; n < given.groups[k].last; ++n) to.push_back(writable<T>(found[n]));
      if (k == 0 && scale) to.push_back(writable<T>(found.back()));
      chain_backward(machine, chain_of<T>(given, k), data<T>(upper[k]), to);
    }
  });
  return found;
}

Chip chip_at(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int>(device));
  check(cudaSetDevice(static_cast<int>(device)), "choosing the GPU");
  return chip_of(static_cast<int>(device));
}

bool template_fits(
    int64_t gates, int64_t rank, int64_t rows1, int64_t rows2, bool training, int64_t precision, int64_t device) {
  const int n1 = static_cast<int>(rows1), n2 = static_cast<int>(rows2);
  return pair_fits(AnyShape{n1, n1, n2, n2}, static_cast<int>(gates), static_cast<int>(rank), chip_at(device), training,
      precision_of(precision));
}

int number(int64_t n) { return static_cast<int>(least(n, kHuge - 1)); }

// sizes: in the order of LowRankSizes.
LowRankSizes low_rank_sizes(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 9, "kruify: nine sizes tell of a matrix of low rank, got ", sizes.size());
  int n[9];
  std::transform(sizes.begin(), sizes.end(), n, number);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
}

bool low_rank_fits_operator(const std::vector<int64_t>& sizes, int64_t batch, int64_t precision, int64_t device) {
  return low_rank_fits(low_rank_sizes(sizes), number(batch), chip_at(device), precision_of(precision));
}

bool low_rank_pays_operator(
    const std::vector<int64_t>& sizes, int64_t batch, bool training, bool kept, int64_t precision, int64_t device) {
  return low_rank_pays(low_rank_sizes(sizes), number(batch), chip_at(device), training, kept, precision_of(precision));
}

}  // namespace

}  // namespace kruify::cuda

// The tests run these operators on CPU tensors, beside the CPU's own, under another name.
#if !defined(KRUIFY_CUDA_LIBRARY)
#define KRUIFY_CUDA_LIBRARY kruify
#define KRUIFY_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(KRUIFY_CUDA_LIBRARY, KRUIFY_CUDA_KEY, m) {
  namespace cuda = kruify::cuda;
  m.impl("kron_matmul", TORCH_BOX(&kruify::kron_matmul<cuda::product_operator>));
  m.impl("kron_matmul_forward", TORCH_BOX(&kruify::kron_matmul<cuda::product_operator>));
  m.impl("kron_matmul_backward", TORCH_BOX(&kruify::kron_matmul_backward<cuda::product_backward_operator>));
  m.impl("merge", TORCH_BOX(&cuda::merge));
  m.impl("merge_backward", TORCH_BOX(&cuda::merge_backward));
  m.impl("recurrence", TORCH_BOX(&kruify::recurrence<cuda::recurrence_operator>));
  m.impl("recurrence_forward", TORCH_BOX(&kruify::recurrence<cuda::recurrence_operator>));
  m.impl("recurrence_backward", TORCH_BOX(&kruify::recurrence_backward<cuda::recurrence_backward_operator>));
}

STABLE_TORCH_LIBRARY_IMPL(KRUIFY_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("template_fits", TORCH_BOX(&kruify::cuda::template_fits));
  m.impl("low_rank_fits", TORCH_BOX(&kruify::cuda::low_rank_fits_operator));
  m.impl("low_rank_pays", TORCH_BOX(&kruify::cuda::low_rank_pays_operator));
}
