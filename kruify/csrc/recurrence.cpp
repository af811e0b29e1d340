// The operators `recurrence` and `recurrence_backward`: a whole layer in one direction.
#include <algorithm>
#include <tuple>

#include "linear.h"

namespace kruify {
namespace {

Kind kind_of(const std::string& name) {
  if (name == "lstm") return Kind::kLstm;
  if (name == "gru") return Kind::kGru;
  if (name == "rnn_tanh") return Kind::kRnnTanh;
  if (name == "rnn_modrelu") return Kind::kModRelu;
  if (name == "rnn_modrelu_complex") return Kind::kModReluComplex;
  STD_TORCH_CHECK(name == "rnn_relu", "kruify::recurrence: unknown kind '", name, "'");
  return Kind::kRnnRelu;
}

int64_t gates_of(Kind kind) { return kind == Kind::kLstm ? 4 : kind == Kind::kGru ? 3 : 1; }
int64_t workspace_of(Kind kind) { return kind == Kind::kLstm ? 5 : kind == Kind::kGru ? 4 : is_modrelu(kind) ? 1 : 0; }
int64_t rows_a_bias(Kind kind) { return kind == Kind::kModReluComplex ? 2 : 1; }

// Where each step's rows start; checks that batch_sizes is that of a packed batch of `batch` samples.
std::vector<int64_t> starts_of(const Tensor& batch_sizes, int64_t batch) {
  const int64_t* sizes = pointer<int64_t>(batch_sizes);
  const int64_t steps = batch_sizes.numel();
  std::vector<int64_t> starts(steps + 1, 0);
  for (int64_t t = 0; t < steps; ++t) {
    STD_TORCH_CHECK(sizes[t] >= 0 && sizes[t] <= (t ? sizes[t - 1] : batch), "kruify::recurrence: batch_sizes must start with ",
                    batch, " and never grow, got ", sizes[t], " at step ", t);
    starts[t + 1] = starts[t] + sizes[t];
  }
  STD_TORCH_CHECK(steps == 0 || sizes[0] == batch, "kruify::recurrence: batch_sizes starts with ", steps ? sizes[0] : 0, ", h0 has ",
                  batch, " rows");
  return starts;
}

template <class T>
void check_shape(const Matrix<T>& m, Kind kind, int64_t hidden) {
  STD_TORCH_CHECK(m.gates == gates_of(kind), "kruify::recurrence: this kind has ", gates_of(kind), " gates, the layout ", m.gates);
  STD_TORCH_CHECK(m.rows == hidden && m.cols == hidden, "kruify::recurrence: a state of ", hidden, " with a matrix of ", m.rows, "x",
                  m.cols);
  STD_TORCH_CHECK(hidden % rows_a_bias(kind) == 0, "kruify::recurrence: a complex state of ", hidden, " real numbers");
}

// modReLU's bias belongs to the cell: the matrix is left without one.
template <class T>
void bind(Sequence<T>& s, const Matrix<T>& m) {
  s.matrix = m;
  if (is_modrelu(s.kind)) std::swap(s.threshold, s.matrix.bias);
}

constexpr int64_t kChunkBytes = 3 << 18;  // of input gates that stay in the L2 cache between GEMM and time loop

template <class T>
void copy_rows(const Tensor& from, T* to) {
  const T* p = pointer<T>(from);
  std::copy(p, p + from.numel(), to);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Outputs run(const Tensor& x_given, const Optional& w_ih_given, const Optional& bias_ih_given, const Tensor& sizes_given,
            const Tensor& h0_given, const Optional& c0_given, const std::vector<Tensor>& stages, const Optional& diagonal,
            const Optional& overlay, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout, Kind kind,
            bool reverse, bool training) {
  const auto dtype = x_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, overlay, index, bias, layout, dtype, rows_a_bias(kind));
  const Tensor h0 = checked("h0", h0_given, dtype, -1, w.matrix.rows);
  const int64_t batch = h0.size(0), H = h0.size(1), width = gates_of(kind) * H;
  check_shape(w.matrix, kind, H);
  STD_TORCH_CHECK(c0_given.has_value() == (kind == Kind::kLstm), "kruify::recurrence: c0 belongs to the LSTM alone");
  const Tensor sizes = checked("batch_sizes", sizes_given, torch::headeronly::ScalarType::Long, -1);
  const std::vector<int64_t> starts = starts_of(sizes, batch);
  const int64_t rows = starts.back(), steps = sizes.numel();
  const Tensor x = checked("x", x_given, dtype, rows, w_ih_given ? -1 : width);
  const int64_t inputs = x.size(1);
  Optional w_ih, bias_ih;
  if (w_ih_given) w_ih = checked("w_ih", *w_ih_given, dtype, width, inputs);
  if (bias_ih_given) bias_ih = checked("bias_ih", *bias_ih_given, dtype, width);

  Tensor out = empty_like(x, {rows, H}), h = empty_like(x, {batch, H});
  Tensor c = c0_given ? empty_like(x, {batch, H}) : empty_like(x, {0});
  Tensor workspace = empty_like(x, {training ? rows : 0, workspace_of(kind) * H});
  copy_rows(h0, mutable_pointer<T>(h));
  if (c0_given) copy_rows(checked("c0", *c0_given, dtype, batch, H), mutable_pointer<T>(c));
  if (rows == 0) return {out, h, c, workspace};

  Buffer<T> packed(w.packed_size);
  w.pack(packed.data());
  Sequence<T> s{};
  s.kind = kind, s.reverse = reverse, s.training = training;
  bind(s, w.matrix);
  // What is constant over time enters with the input's share; the GRU's last gate adds its own inside r * (...).
  const int64_t outside = kind == Kind::kGru ? 2 * H : width;
  Buffer<T> constant(width);
  std::fill_n(constant.data(), width, T(0));
  if (bias_ih) kernels<T>().axpy(width, pointer<T>(*bias_ih), constant.data());
  if (s.matrix.bias) kernels<T>().axpy(outside, s.matrix.bias, constant.data());

  s.steps = steps, s.batch = batch, s.hidden = H;
  s.sizes = pointer<int64_t>(sizes), s.starts = starts.data();
  s.h = mutable_pointer<T>(h), s.c = mutable_pointer<T>(c), s.out = mutable_pointer<T>(out);
  const bool in_workspace = training && workspace_of(kind) > 0, in_out = width == H && !in_workspace;
  // A row of gates: those of the workspace but for c, so that the GRU has room for W_hn h + b_hn beside n.
  const int64_t gates_width = kind == Kind::kGru ? 4 * H : width;
  const int64_t chunk_rows = std::max<int64_t>(kChunkBytes / int64_t(sizeof(T)) / width, 48);
  const int64_t buffer_rows = std::min(rows, std::max(chunk_rows, batch));
  Buffer<T> gates(in_out || in_workspace ? 0 : buffer_rows * gates_width);
  std::optional<PackedB<T>> packed_ih;
  if (w_ih && rows > 4) packed_ih.emplace(inputs, width, pointer<T>(*w_ih), 1, inputs);

  // Samples are shared out in small tiles: one suffices where the trailing products fill the registers.
  bool thin = w.matrix.overlay != nullptr;
  for (int t = 0; t < w.matrix.terms; ++t)
    thin |= w.matrix.term[t].kind == TermKind::kDense || w.matrix.term[t].kind == TermKind::kLowRank;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), batch);
  const int64_t tile = thin ? std::min<int64_t>(w.matrix.overlay ? kTile : 8, (batch + threads - 1) / threads) : 1;
  const int64_t tiles = (batch + tile - 1) / tile, scratch_size = w.matrix.scratch;
  const int64_t workers = std::min(threads, tiles);
  Buffer<T> scratch(workers * (scratch_size + 16));

  for (int64_t done = 0; done < steps;) {
    // A chunk of steps [t0, t1) whose rows fit the buffer.
    int64_t t0 = done, t1 = done;
    const int64_t limit = buffer_rows;
    auto size_at = [&](int64_t i) { return s.sizes[reverse ? steps - 1 - i : i]; };
    for (int64_t total = 0; t1 < steps && total + size_at(t1) <= limit; ++t1) total += size_at(t1);
    done = t1;
    if (reverse) std::tie(t0, t1) = std::make_pair(steps - t1, steps - t0);
    const int64_t first = starts[t0], count = starts[t1] - first;
    s.first_row = first;
    s.gates = in_out ? s.out + first * H : in_workspace ? mutable_pointer<T>(workspace) + first * workspace_of(kind) * H : gates.data();
    s.gates_ld = in_workspace ? workspace_of(kind) * H : gates_width;
    const T* rows_x = pointer<T>(x) + first * inputs;
    if (packed_ih) {
      packed_ih->multiply(count, rows_x, inputs, 1, constant.data(), s.gates, s.gates_ld);
    } else if (w_ih) {
      kernels<T>().thin_gemm(count, width, inputs, rows_x, pointer<T>(*w_ih), constant.data(), s.gates, s.gates_ld);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(rows_x + i * width, width, s.gates + i * s.gates_ld);
        kernels<T>().axpy(width, constant.data(), s.gates + i * s.gates_ld);
      }
    }
    parallel(workers, [&](int64_t worker) {
      for (int64_t i = worker; i < tiles; i += workers)
        kernels<T>().forward(s, t0, t1, i * tile, std::min(batch, (i + 1) * tile), scratch.data() + worker * (scratch_size + 16));
    });
  }
  return {out, h, c, workspace};
}

Outputs recurrence(const Tensor& x, const Optional& w_ih, const Optional& bias_ih, const Tensor& batch_sizes, const Tensor& h0,
                   const Optional& c0, const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& overlay,
                   const Optional& index, const Optional& bias, const std::vector<int64_t>& layout, const std::string& kind,
                   bool reverse, bool training, int64_t precision) {
  check_precision(precision);
  const bool single = floating("recurrence", x) == torch::headeronly::ScalarType::Float;
  const auto call = single ? &run<float> : &run<double>;
  return call(x, w_ih, bias_ih, batch_sizes, h0, c0, stages, diagonal, overlay, index, bias, layout, kind_of(kind), reverse, training);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <class T>
Gradients run_backward(const Optional& grad_out_given, const Optional& grad_h_given, const Optional& grad_c_given,
                       const Tensor& out_given, const Tensor& workspace_given, const Tensor& sizes_given, const Tensor& h0_given,
                       const Optional& c0_given, const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& overlay,
                       const Optional& index, const Optional& bias, const std::vector<int64_t>& layout, Kind kind, bool reverse) {
  const auto dtype = out_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, overlay, index, bias, layout, dtype, rows_a_bias(kind));
  const Tensor h0 = checked("h0", h0_given, dtype, -1, w.matrix.rows);
  const int64_t batch = h0.size(0), H = h0.size(1), width = gates_of(kind) * H;
  check_shape(w.matrix, kind, H);
  STD_TORCH_CHECK(c0_given.has_value() == (kind == Kind::kLstm), "kruify::recurrence_backward: c0 belongs to the LSTM alone");
  const Tensor sizes = checked("batch_sizes", sizes_given, torch::headeronly::ScalarType::Long, -1);
  const std::vector<int64_t> starts = starts_of(sizes, batch);
  const int64_t rows = starts.back();
  const Tensor out = checked("out", out_given, dtype, rows, H);
  const Tensor workspace = checked("workspace", workspace_given, dtype, rows, workspace_of(kind) * H);
  Optional grad_out, c0;
  if (grad_out_given) grad_out = checked("grad_out", *grad_out_given, dtype, rows, H);
  if (c0_given) c0 = checked("c0", *c0_given, dtype, batch, H);

  Tensor grad_gates = empty_like(out, {rows, width}), grad_h = empty_like(out, {batch, H});
  Tensor grad_c = c0 ? empty_like(out, {batch, H}) : empty_like(out, {0});
  auto start = [&](const char* what, const Optional& given, const Tensor& into) {
    if (given) copy_rows(checked(what, *given, dtype, batch, H), mutable_pointer<T>(into));
    else std::fill_n(mutable_pointer<T>(into), into.numel(), T(0));
  };
  start("grad_hT", grad_h_given, grad_h);
  if (c0) start("grad_cT", grad_c_given, grad_c);

  Buffer<T> packed(w.packed_size);
  w.pack(packed.data());
  Sequence<T> s{};
  s.kind = kind, s.reverse = reverse, s.saved = workspace_of(kind);
  s.steps = sizes.numel(), s.batch = batch, s.hidden = H;
  s.sizes = pointer<int64_t>(sizes), s.starts = starts.data();
  bind(s, w.matrix);
  s.grad_out = grad_out ? pointer<T>(*grad_out) : nullptr;
  s.workspace = pointer<T>(workspace), s.out_in = pointer<T>(out);
  s.h0 = pointer<T>(h0), s.c0 = c0 ? pointer<T>(*c0) : nullptr;
  s.grad_gates = mutable_pointer<T>(grad_gates);
  s.grad_h = mutable_pointer<T>(grad_h), s.grad_c = c0 ? mutable_pointer<T>(grad_c) : nullptr;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), batch));
  const int64_t tile = w.matrix.overlay ? std::min<int64_t>(kTile, (batch + threads - 1) / threads) : 1;
  const int64_t tiles = batch == 0 ? 0 : (batch + tile - 1) / tile, workers = std::max<int64_t>(1, std::min(threads, tiles));
  const int64_t scratch_size = w.matrix.scratch + (kind == Kind::kGru ? tile * width : 0) + 16;
  Buffer<T> arenas(workers * w.matrix.grad_size), scratch(workers * scratch_size);
  std::fill_n(arenas.data(), workers * w.matrix.grad_size, T(0));
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = worker; i < tiles; i += workers)
      kernels<T>().backward(s, i * tile, std::min(batch, (i + 1) * tile), arenas.data() + worker * w.matrix.grad_size,
                            scratch.data() + worker * scratch_size);
  });
  return {grad_gates, grad_h, grad_c, collect(w, arenas.data(), workers)};
}

Gradients recurrence_backward(const Optional& grad_out, const Optional& grad_h, const Optional& grad_c, const Tensor& out,
                              const Tensor& workspace, const Tensor& batch_sizes, const Tensor& h0, const Optional& c0,
                              const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& overlay,
                              const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
                              const std::string& kind, bool reverse, int64_t precision) {
  check_precision(precision);
  const bool single = floating("recurrence_backward", out) == torch::headeronly::ScalarType::Float;
  const auto call = single ? &run_backward<float> : &run_backward<double>;
  return call(grad_out, grad_h, grad_c, out, workspace, batch_sizes, h0, c0, stages, diagonal, overlay, index, bias, layout,
              kind_of(kind), reverse);
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&kruify::recurrence));
  m.impl("recurrence_forward", TORCH_BOX(&kruify::recurrence));
  m.impl("recurrence_backward", TORCH_BOX(&kruify::recurrence_backward));
}
