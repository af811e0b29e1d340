// The operators on CUDA tensors: check, allocate, and run schedule.h on the current stream.
#include "factor_arguments.cuh"

namespace kruify::cuda {

namespace {

Kind kind_of(const std::string& name) {
  constexpr const char* names[] = {"lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_modrelu", "rnn_modrelu_complex"};
  for (int k = 0; k < 6; ++k)
    if (name == names[k]) return Kind(k);
  STD_TORCH_CHECK(false, "kruify: unknown kind '", name, "'");
}

Precision precision_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "kruify: there is no precision ", number);
  return Precision(number);
}

Tensor kron_matmul(Tensor x, std::vector<Tensor> stages, Optional diagonal, Optional sparse, Optional index,
    Optional bias, std::vector<int64_t> layout, int64_t precision_number) {
  const Precision precision = precision_of(precision_number);
  STD_TORCH_CHECK(x.dim() > 0, "kruify: x must have at least one dimension");
  const MatrixArguments given(x, stages, diagonal, sparse, index, bias, layout);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == given.layout.cols, "kruify: x has ", x.size(x.dim() - 1), " columns, W has ",
      given.layout.cols);
  const Tensor from = torch::stable::contiguous(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = static_cast<int64_t>(given.layout.gates) * given.layout.rows;
  Tensor y = empty(x, sizes);
  Machine machine(x);
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    Matrix<T> m = given.matrix<T>(machine);
    product<T>(machine, m, data<T>(from), from.numel() / given.layout.cols, writable<T>(y), precision);
  });
  return y;
}

std::tuple<Tensor, std::vector<Tensor>> kron_matmul_backward(Tensor grad, Tensor x, std::vector<Tensor> stages,
    Optional diagonal, Optional sparse, Optional index, Optional bias, std::vector<int64_t> layout,
    int64_t precision_number) {
  const Precision precision = precision_of(precision_number);
  STD_TORCH_CHECK(x.dim() > 0, "kruify: x must have at least one dimension");
  const MatrixArguments given(x, stages, diagonal, sparse, index, bias, layout);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == given.layout.cols, "kruify: x has ", x.size(x.dim() - 1), " columns, W has ",
      given.layout.cols);
  const int64_t rows = x.numel() / given.layout.cols;
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index() &&
          grad.scalar_type() == x.scalar_type() && grad.numel() == rows * given.layout.gates * given.layout.rows,
      "kruify: the gradient does not have the shape, dtype or device of the product");
  const Tensor from = torch::stable::contiguous(x), upper = torch::stable::contiguous(grad);
  Tensor grad_x = empty(x, {x.sizes().begin(), x.sizes().end()});
  std::vector<Tensor> found;
  Machine machine(x);
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    Matrix<T> m = given.matrix<T>(machine);
    product_backward<T>(machine, m, data<T>(upper), data<T>(from), rows, writable<T>(grad_x),
        gradients<T>(given, sparse, found), precision);
  });
  return {grad_x, found};
}

std::vector<Tensor> merge(std::vector<Tensor> factors, Optional scale, std::vector<int64_t> groups) {
  const FactorArguments given(factors, scale, groups);
  Machine machine(factors[0]);
  return given.merged(machine);
}

std::vector<Tensor> merge_backward(
    std::vector<Tensor> grads, std::vector<Tensor> factors, Optional scale, std::vector<int64_t> groups) {
  const FactorArguments given(factors, scale, groups);
  Machine machine(factors[0]);
  return given.backward(machine, grads);
}

bool template_fits(
    int64_t gates, int64_t rank, int64_t rows1, int64_t rows2, bool training, int64_t precision, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int>(device));
  check(cudaSetDevice(static_cast<int>(device)), "choosing the GPU");
  const AnyShape s{static_cast<int>(rows1), static_cast<int>(rows1), static_cast<int>(rows2), static_cast<int>(rows2)};
  return pair_fits(s, static_cast<int>(gates), static_cast<int>(rank), chip_of(static_cast<int>(device)), training,
      precision_of(precision));
}

// The packed rows of a call. What the device needs of batch_sizes travels in the parameters of a launch.
Rows rows_of(Machine& machine, const Tensor& batch_sizes, int64_t total, int64_t batch, bool reverse) {
  STD_TORCH_CHECK(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
      "kruify: batch_sizes must be int64 of one dimension on the CPU");
  const Tensor held = torch::stable::contiguous(batch_sizes);
  const int64_t steps = held.numel(), *sizes = data<int64_t>(held);
  STD_TORCH_CHECK(total < (int64_t{1} << 31) && steps < (int64_t{1} << 31) && batch < (int64_t{1} << 27),
      "kruify: ", total, " rows are too many for one call");
  STD_TORCH_CHECK(
      !steps || sizes[0] == batch, "kruify: h0 has ", batch, " rows, the first step ", steps ? sizes[0] : 0);
  std::vector<int> starts(1, 0);
  int64_t sum = 0;
  for (int64_t t = 0; t < steps; ++t) {
    STD_TORCH_CHECK(
        sizes[t] > 0 && (!t || sizes[t] <= sizes[t - 1]), "kruify: batch_sizes must be positive and must not grow");
    sum += sizes[t];
    STD_TORCH_CHECK(sum <= total, "kruify: batch_sizes hold more rows than x");
    starts.push_back(static_cast<int>(sum));
  }
  STD_TORCH_CHECK(sum == total, "kruify: batch_sizes hold ", sum, " rows, x has ", total);
  const bool equal = !steps || sizes[steps - 1] == sizes[0];
  return {equal ? nullptr : machine.upload(starts), static_cast<int>(steps), static_cast<int>(batch), reverse};
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_operator(Tensor x, Optional w_ih, Optional bias_ih,
    Tensor batch_sizes, Tensor h0, Optional c0, std::vector<Tensor> stages, Optional diagonal, Optional sparse,
    Optional index, Optional bias, std::vector<int64_t> layout, std::string kind_name, bool reverse, bool training,
    int64_t precision_number) {
  const Precision precision = precision_of(precision_number);
  const Kind kind = kind_of(kind_name);
  const MatrixArguments given(x, stages, diagonal, sparse, index, bias, layout, rows_a_bias(kind));
  const int64_t hidden = given.layout.rows, width = given.layout.gates * hidden;
  STD_TORCH_CHECK(given.layout.gates == gates_of(kind) && given.layout.cols == hidden, "kruify: ", kind_name,
      " takes a square matrix of ", gates_of(kind), " gates");
  STD_TORCH_CHECK(hidden % rows_a_bias(kind) == 0, "kruify: a complex state of ", hidden, " real numbers");
  STD_TORCH_CHECK(c0.has_value() == (kind == kLstm), "kruify: c0 belongs to kind 'lstm' alone");
  const Tensor from = checked("x", x, x, {-1, w_ih ? -1 : width}), h = checked("h0", h0, x, {-1, hidden});
  const int64_t total = from.size(0), batch = h.size(0);
  Optional c, weight, bias_in;
  if (c0) c = checked("c0", *c0, x, {batch, hidden});
  if (w_ih) weight = checked("w_ih", *w_ih, x, {width, from.size(1)});
  if (bias_ih) bias_in = checked("bias_ih", *bias_ih, x, {width});
  Machine machine(x);
  const Rows rows = rows_of(machine, batch_sizes, total, batch, reverse);
  const Tensor gates = weight ? linear(from, *weight, bias_in) : from;
  Tensor out = empty(x, {total, hidden}), h_last = empty(x, {batch, hidden});
  Tensor c_last = kind == kLstm ? empty(x, {batch, hidden}) : empty(x, {0});
  Tensor workspace = empty(x, {training ? total : 0, saved_of(kind) * hidden});
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    const T* ready = data<T>(gates);
    if (!weight && bias_in) {
      T* sum = machine.scratch<T>(total * width);
      machine.run(AddBias<T>{ready, data<T>(bias_in), sum, total, width});
      ready = sum;
    }
    Matrix<T> m = given.matrix<T>(machine);
    recurrence<T>(machine, m, kind,
        GeneralForward<T>{ready, data<T>(h), data<T>(c), writable<T>(out), writable<T>(h_last), writable<T>(c_last),
            training ? writable<T>(workspace) : nullptr, rows},
        precision);
  });
  return {out, h_last, c_last, workspace};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrence_backward_operator(Optional grad_out, Optional grad_h,
    Optional grad_c, Tensor out, Tensor workspace, Tensor batch_sizes, Tensor h0, Optional c0,
    std::vector<Tensor> stages, Optional diagonal, Optional sparse, Optional index, Optional bias,
    std::vector<int64_t> layout, std::string kind_name, bool reverse, int64_t precision_number) {
  const Precision precision = precision_of(precision_number);
  const Kind kind = kind_of(kind_name);
  const MatrixArguments given(out, stages, diagonal, sparse, index, bias, layout, rows_a_bias(kind));
  const int64_t hidden = given.layout.rows, width = given.layout.gates * hidden;
  STD_TORCH_CHECK(given.layout.gates == gates_of(kind) && given.layout.cols == hidden, "kruify: ", kind_name,
      " takes a square matrix of ", gates_of(kind), " gates");
  STD_TORCH_CHECK(hidden % rows_a_bias(kind) == 0, "kruify: a complex state of ", hidden, " real numbers");
  STD_TORCH_CHECK(c0.has_value() == (kind == kLstm), "kruify: c0 belongs to kind 'lstm' alone");
  const Tensor result = checked("out", out, out, {-1, hidden}), h = checked("h0", h0, out, {-1, hidden});
  const int64_t total = result.size(0), batch = h.size(0);
  const Tensor saved = checked("workspace", workspace, out, {total, saved_of(kind) * hidden});
  Optional c, upper, upper_h, upper_c;
  if (c0) c = checked("c0", *c0, out, {batch, hidden});
  if (grad_out) upper = checked("grad_out", *grad_out, out, {total, hidden});
  if (grad_h) upper_h = checked("grad_hT", *grad_h, out, {batch, hidden});
  if (grad_c && kind == kLstm) upper_c = checked("grad_cT", *grad_c, out, {batch, hidden});
  Machine machine(out);
  const Rows rows = rows_of(machine, batch_sizes, total, batch, reverse);
  Tensor grad_gates = empty(out, {total, width}), grad_h0 = empty(out, {batch, hidden});
  Tensor grad_c0 = kind == kLstm ? empty(out, {batch, hidden}) : empty(out, {0});
  std::vector<Tensor> found;
  typed(out, [&](auto zero) {
    using T = decltype(zero);
    Matrix<T> m = given.matrix<T>(machine);
    const GeneralBackward<T> args{data<T>(upper), data<T>(upper_h), data<T>(upper_c), data<T>(result), data<T>(saved),
        data<T>(h), data<T>(c), writable<T>(grad_gates), nullptr, writable<T>(grad_h0), writable<T>(grad_c0), rows};
    recurrence_backward<T>(machine, m, kind, args, total, gradients<T>(given, sparse, found), precision);
  });
  return {grad_gates, grad_h0, grad_c0, found};
}

}  // namespace

}  // namespace kruify::cuda

STABLE_TORCH_LIBRARY_IMPL(kruify, CUDA, m) {
  m.impl("kron_matmul", TORCH_BOX(&kruify::cuda::kron_matmul));
  m.impl("kron_matmul_forward", TORCH_BOX(&kruify::cuda::kron_matmul));
  m.impl("kron_matmul_backward", TORCH_BOX(&kruify::cuda::kron_matmul_backward));
  m.impl("merge", TORCH_BOX(&kruify::cuda::merge));
  m.impl("merge_backward", TORCH_BOX(&kruify::cuda::merge_backward));
  m.impl("recurrence", TORCH_BOX(&kruify::cuda::recurrence_operator));
  m.impl("recurrence_forward", TORCH_BOX(&kruify::cuda::recurrence_operator));
  m.impl("recurrence_backward", TORCH_BOX(&kruify::cuda::recurrence_backward_operator));
}

STABLE_TORCH_LIBRARY_IMPL(kruify, CompositeExplicitAutograd, m) {
  m.impl("template_fits", TORCH_BOX(&kruify::cuda::template_fits));
}
