// The operators `recurrence`, `recurrence_backward` and `layer_backward`: a whole layer in one direction.
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
    STD_TORCH_CHECK(sizes[t] >= 0 && sizes[t] <= (t ? sizes[t - 1] : batch),
        "kruify::recurrence: batch_sizes must start with ", batch, " and never grow, got ", sizes[t], " at step ", t);
    starts[t + 1] = starts[t] + sizes[t];
  }
  STD_TORCH_CHECK(steps == 0 || sizes[0] == batch, "kruify::recurrence: batch_sizes starts with ", steps ? sizes[0] : 0,
      ", h0 has ", batch, " rows");
  return starts;
}

template <class T> void check_shape(const Matrix<T>& m, Kind kind, int64_t hidden) {
  STD_TORCH_CHECK(
      m.gates == gates_of(kind), "kruify::recurrence: this kind has ", gates_of(kind), " gates, the layout ", m.gates);
  STD_TORCH_CHECK(m.rows == hidden && m.cols == hidden, "kruify::recurrence: a state of ", hidden, " with a matrix of ",
      m.rows, "x", m.cols);
  STD_TORCH_CHECK(hidden % rows_a_bias(kind) == 0, "kruify::recurrence: a complex state of ", hidden, " real numbers");
}

// modReLU's bias belongs to the cell: the matrix is left without one.
template <class T> void bind(Sequence<T>& s, const Matrix<T>& m) {
  s.matrix = m;
  if (is_modrelu(s.kind)) std::swap(s.threshold, s.matrix.bias);
}

constexpr int64_t kChunkBytes =
    3 << 18;  // of input gates, or their gradients, that stay in the L2 cache between GEMM and time loop
constexpr int64_t kSideBySide = 8;  // samples that share what a product reads of a plain or thin matrix
constexpr int64_t kFewRows = 192;   // up to which W_ih is packed panel by panel

// Steps that are done together, [t0, t1) after `done` of all in the order of the walk: as many as have `limit` rows.
template <class T>
std::pair<int64_t, int64_t> chunk_of(const Sequence<T>& s, int64_t done, int64_t limit, bool from_end) {
  int64_t end = done;
  auto size_at = [&](int64_t i) { return s.sizes[from_end ? s.steps - 1 - i : i]; };
  for (int64_t total = 0; end < s.steps && total + size_at(end) <= limit; ++end) total += size_at(end);
  return from_end ? std::make_pair(s.steps - end, s.steps - done) : std::make_pair(done, end);
}

// How samples are shared out: `together` go through a product side by side, a worker takes tiles of `tile`.
struct Tiles {
  int64_t together, tile, count, workers;

  Tiles(int64_t batch, int64_t side_by_side) {
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), batch));
    const int64_t share = (batch + threads - 1) / threads;
    together = std::max<int64_t>(1, std::min(share, side_by_side));
    tile = std::max<int64_t>(1, std::min<int64_t>(share, std::max(side_by_side, kSideBySide)));
    count = (batch + tile - 1) / tile;
    workers = std::max<int64_t>(1, std::min(threads, count));
  }
};

template <class T> bool has_term(const Matrix<T>& m, std::initializer_list<TermKind> kinds) {
  const auto one_of = [&](const Term<T>& t) { return std::find(kinds.begin(), kinds.end(), t.kind) != kinds.end(); };
  return std::any_of(m.term, m.term + m.terms, one_of);
}

template <class T> void copy_rows(const Tensor& from, T* to) {
  const T* p = pointer<T>(from);
  std::copy(p, p + from.numel(), to);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Outputs run(const Tensor& x_given, const Optional& w_ih_given, const Optional& bias_ih_given, const Tensor& sizes_given,
    const Tensor& h0_given, const Optional& c0_given, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& sparse, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout, Kind kind,
    bool reverse, bool training) {
  const auto dtype = x_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, sparse, index, bias, layout, dtype, rows_a_bias(kind));
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
  const bool few = rows <= kFewRows;  // in one chunk
  const int64_t buffer_rows = few ? rows : std::min(rows, std::max(chunk_rows, batch));
  Buffer<T> gates(in_out || in_workspace ? 0 : buffer_rows * gates_width);
  std::optional<PackedB<T>> packed_ih;
  if (w_ih && !few) packed_ih.emplace(inputs, width, pointer<T>(*w_ih), 1, inputs);

  // One sample at a time suffices where the trailing products fill the registers.
  const bool thin = has_term<T>(w.matrix, {TermKind::kDense, TermKind::kLowRank});
  const Tiles tiles(batch, w.matrix.sparse ? kTile : thin ? kSideBySide : 1);
  s.together = tiles.together;
  const int64_t scratch_size = w.matrix.scratch + 16;
  Buffer<T> scratch(tiles.workers * scratch_size);

  for (int64_t done = 0; done < steps;) {
    const auto [t0, t1] = chunk_of(s, done, buffer_rows, reverse);
    done += t1 - t0;
    const int64_t first = starts[t0], count = starts[t1] - first;
    s.first_row = first;
    s.gates = in_out   ? s.out + first * H
        : in_workspace ? mutable_pointer<T>(workspace) + first * workspace_of(kind) * H
                       : gates.data();
    s.gates_ld = in_workspace ? workspace_of(kind) * H : gates_width;
    const T* rows_x = pointer<T>(x) + first * inputs;
    if (packed_ih) {
      packed_ih->multiply(count, rows_x, inputs, 1, constant.data(), s.gates, s.gates_ld);
    } else if (w_ih && rows > 4) {
      multiply_by_panels(count, width, inputs, rows_x, pointer<T>(*w_ih), constant.data(), s.gates, s.gates_ld);
    } else if (w_ih) {
      kernels<T>().thin_gemm(count, width, inputs, rows_x, pointer<T>(*w_ih), constant.data(), s.gates, s.gates_ld);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(rows_x + i * width, width, s.gates + i * s.gates_ld);
        kernels<T>().axpy(width, constant.data(), s.gates + i * s.gates_ld);
      }
    }
    parallel(tiles.workers, [&, t0 = t0, t1 = t1](int64_t worker) {
      for (int64_t i = worker; i < tiles.count; i += tiles.workers)
        kernels<T>().forward(
            s, t0, t1, i * tiles.tile, std::min(batch, (i + 1) * tiles.tile), scratch.data() + worker * scratch_size);
    });
  }
  return {out, h, c, workspace};
}

Outputs recurrence(const Tensor& x, const Optional& w_ih, const Optional& bias_ih, const Tensor& batch_sizes,
    const Tensor& h0, const Optional& c0, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& sparse, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
    const std::string& kind, bool reverse, bool training, int64_t precision) {
  check_precision(precision);
  const bool single = floating("recurrence", x) == torch::headeronly::ScalarType::Float;
  const auto call = single ? &run<float> : &run<double>;
  return call(x, w_ih, bias_ih, batch_sizes, h0, c0, stages, diagonal, sparse, index, bias, layout, kind_of(kind),
      reverse, training);
}

// What the gradients of the gates are for: with W_ih those of x, W_ih and b_ih as far as they are needed, without it
// they are themselves those of x.
struct Inputs {
  const Tensor& x;
  const Optional& w_ih;
  bool needs_x, needs_w_ih, needs_bias_ih;
};

struct Gradients {
  Tensor x, w_ih, bias_ih, h0, c0;
  std::vector<Tensor> matrix;
};

template <class T>
Gradients run_backward(const std::optional<Inputs>& inputs, const Optional& grad_out_given,
    const Optional& grad_h_given, const Optional& grad_c_given, const Tensor& out_given, const Tensor& workspace_given,
    const Tensor& sizes_given, const Tensor& h0_given, const Optional& c0_given, const std::vector<Tensor>& stages,
    const Optional& diagonal, const Optional& sparse, const Optional& index, const Optional& bias,
    const std::vector<int64_t>& layout, Kind kind, bool reverse) {
  const auto dtype = out_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, sparse, index, bias, layout, dtype, rows_a_bias(kind));
  const Tensor h0 = checked("h0", h0_given, dtype, -1, w.matrix.rows);
  const int64_t batch = h0.size(0), H = h0.size(1), width = gates_of(kind) * H;
  check_shape(w.matrix, kind, H);
  STD_TORCH_CHECK(
      c0_given.has_value() == (kind == Kind::kLstm), "kruify::recurrence_backward: c0 belongs to the LSTM alone");
  const Tensor sizes = checked("batch_sizes", sizes_given, torch::headeronly::ScalarType::Long, -1);
  const std::vector<int64_t> starts = starts_of(sizes, batch);
  const int64_t rows = starts.back();
  const Tensor out = checked("out", out_given, dtype, rows, H);
  const Tensor workspace = checked("workspace", workspace_given, dtype, rows, workspace_of(kind) * H);
  Optional grad_out, c0;
  if (grad_out_given) grad_out = checked("grad_out", *grad_out_given, dtype, rows, H);
  if (c0_given) c0 = checked("c0", *c0_given, dtype, batch, H);

  const bool projected = inputs && inputs->w_ih;
  Gradients grads;
  Optional x, w_ih;
  int64_t columns = 0;
  if (projected) {
    w_ih = checked("w_ih", *inputs->w_ih, dtype, width, -1), columns = w_ih->size(1);
    x = checked("x", inputs->x, dtype, rows, columns);
    grads.x = empty_like(out, {inputs->needs_x ? rows : 0, columns});
    grads.w_ih = empty_like(out, {inputs->needs_w_ih ? width : 0, columns});
  } else {
    grads.x = empty_like(out, {rows, width}), grads.w_ih = empty_like(out, {0});
  }
  const bool needs_bias = inputs && inputs->needs_bias_ih;
  grads.bias_ih = empty_like(out, {needs_bias ? width : 0});
  Tensor grad_h = grads.h0 = empty_like(out, {batch, H});
  Tensor grad_c = grads.c0 = c0 ? empty_like(out, {batch, H}) : empty_like(out, {0});
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
  s.grad_h = mutable_pointer<T>(grad_h), s.grad_c = c0 ? mutable_pointer<T>(grad_c) : nullptr;
  const Tiles tiles(batch, w.matrix.sparse ? kTile : has_term<T>(w.matrix, {TermKind::kDense}) ? kSideBySide : 1);
  s.together = tiles.together;
  // A chunk's gradients are used while they are in the cache; where they are an output they are one chunk.
  s.gates_ld =
      projected ? width + 16 : width;  // a power of two would put all rows of a column into the same few cache lines
  const int64_t chunk_rows = std::max<int64_t>(kChunkBytes / int64_t(sizeof(T)) / width, 64);
  const int64_t buffer_rows = projected ? std::min(rows, std::max(chunk_rows, batch)) : rows;
  Buffer<T> gates(projected ? buffer_rows * s.gates_ld : 0);
  s.grad_gates = projected ? gates.data() : mutable_pointer<T>(grads.x);
  const int64_t scratch_size = w.matrix.scratch + (kind == Kind::kGru ? tiles.together * s.gates_ld : 0) + 16;
  Buffer<T> arenas(tiles.workers * w.matrix.grad_size), scratch(tiles.workers * scratch_size);
  std::fill_n(arenas.data(), tiles.workers * w.matrix.grad_size, T(0));
  // Both biases enter the gates alike, except for the GRU's last gate and modReLU.
  const bool same_bias = s.matrix.bias && kind != Kind::kGru;
  if (needs_bias) std::fill_n(mutable_pointer<T>(grads.bias_ih), width, T(0));
  if (projected && rows == 0) std::fill_n(mutable_pointer<T>(grads.w_ih), grads.w_ih.numel(), T(0));
  std::optional<PackedB<T>> packed_ih;
  if (projected && inputs->needs_x) packed_ih.emplace(width, columns, pointer<T>(*w_ih), columns, 1);

  for (int64_t done = 0; done < s.steps && rows;) {
    const auto [t0, t1] = chunk_of(s, done, buffer_rows, !reverse);
    const int64_t first = starts[t0], count = starts[t1] - first;
    s.first_row = first;
    parallel(tiles.workers, [&, t0 = t0, t1 = t1](int64_t worker) {
      for (int64_t i = worker; i < tiles.count; i += tiles.workers)
        kernels<T>().backward(s, t0, t1, i * tiles.tile, std::min(batch, (i + 1) * tiles.tile),
            arenas.data() + worker * w.matrix.grad_size, scratch.data() + worker * scratch_size);
    });
    if (packed_ih)
      packed_ih->multiply(
          count, s.grad_gates, s.gates_ld, 1, nullptr, mutable_pointer<T>(grads.x) + first * columns, columns);
    if (projected && inputs->needs_w_ih)
      PackedB<T>(count, columns, pointer<T>(*x) + first * columns, columns, 1)
          .multiply(width, s.grad_gates, 1, s.gates_ld, nullptr, mutable_pointer<T>(grads.w_ih), columns, done > 0);
    for (int64_t i = 0; needs_bias && !same_bias && i < count; ++i)
      kernels<T>().axpy(width, s.grad_gates + i * s.gates_ld, mutable_pointer<T>(grads.bias_ih));
    done += t1 - t0;
  }
  grads.matrix = collect(w, arenas.data(), tiles.workers);
  if (needs_bias && same_bias) copy_rows(grads.matrix.back(), mutable_pointer<T>(grads.bias_ih));
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrence_backward(const Optional& grad_out,
    const Optional& grad_h, const Optional& grad_c, const Tensor& out, const Tensor& workspace,
    const Tensor& batch_sizes, const Tensor& h0, const Optional& c0, const std::vector<Tensor>& stages,
    const Optional& diagonal, const Optional& sparse, const Optional& index, const Optional& bias,
    const std::vector<int64_t>& layout, const std::string& kind, bool reverse, int64_t precision) {
  check_precision(precision);
  const bool single = floating("recurrence_backward", out) == torch::headeronly::ScalarType::Float;
  const auto call = single ? &run_backward<float> : &run_backward<double>;
  Gradients g = call(std::nullopt, grad_out, grad_h, grad_c, out, workspace, batch_sizes, h0, c0, stages, diagonal,
      sparse, index, bias, layout, kind_of(kind), reverse);
  return {g.x, g.h0, g.c0, std::move(g.matrix)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> layer_backward(const Optional& grad_out,
    const Optional& grad_h, const Optional& grad_c, const Tensor& x, const Optional& w_ih, const Tensor& out,
    const Tensor& workspace, const Tensor& batch_sizes, const Tensor& h0, const Optional& c0,
    const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse, const Optional& index,
    const Optional& bias, const std::vector<int64_t>& layout, const std::string& kind, bool reverse, bool needs_x,
    bool needs_w_ih, bool needs_bias_ih, int64_t precision) {
  check_precision(precision);
  const bool single = floating("layer_backward", out) == torch::headeronly::ScalarType::Float;
  const auto call = single ? &run_backward<float> : &run_backward<double>;
  Gradients g = call(Inputs{x, w_ih, needs_x, needs_w_ih, needs_bias_ih}, grad_out, grad_h, grad_c, out, workspace,
      batch_sizes, h0, c0, stages, diagonal, sparse, index, bias, layout, kind_of(kind), reverse);
  return {g.x, g.w_ih, g.bias_ih, g.h0, g.c0, std::move(g.matrix)};
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&kruify::recurrence));
  m.impl("recurrence_forward", TORCH_BOX(&kruify::recurrence));
  m.impl("recurrence_backward", TORCH_BOX(&kruify::recurrence_backward));
  m.impl("layer_backward", TORCH_BOX(&kruify::layer_backward));
}
