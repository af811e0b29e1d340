// The operators `recurrence`, `recurrence_backward` and `layer_backward`: a whole layer in one direction.
#include "int8_matrix.h"
#include "operators.h"
#include "packed.h"

namespace kruify {
namespace {

// Of gates, or their gradients, that stay in the L2 cache between GEMM and time loop.
constexpr int64_t kChunkBytes = 3 << 18;
constexpr int64_t kSideBySide = 8;  // samples that share what a product reads of a plain or thin matrix
constexpr int64_t kManySteps = 8;   // from which on a sparse residual is put in an order of its own
constexpr int64_t kFewRows = 192;   // up to which W_ih is packed panel by panel

template <class T> int64_t chunk_rows(int64_t width, int64_t least) {
  return std::max<int64_t>(kChunkBytes / int64_t(sizeof(T)) / width, least);
}

// What both directions in time have in common. modReLU's bias belongs to the cell: the matrix is left without one.
template <class T> Sequence<T> sequence_of(const Sequences& call, const Matrix<T>& m, Kind kind, bool reverse) {
  Sequence<T> s{};
  s.kind = kind, s.reverse = reverse, s.saved = saved_of(kind);
  s.steps = call.steps, s.batch = call.batch, s.hidden = call.hidden;
  s.sizes = data<int64_t>(call.sizes), s.starts = call.starts.data();
  s.matrix = m;
  if (is_modrelu(kind)) std::swap(s.threshold, s.matrix.bias);
  return s;
}

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

  // One sample at a time suffices where the trailing products fill the registers, as those of pairs and chains do.
  template <class T> Tiles(int64_t batch, const Matrix<T>& m, bool low_rank_too, bool int8 = false) {
    const bool thin = int8 || std::any_of(m.begin(), m.end(), [&](const Term<T>& t) {
      return t.kind == TermKind::kDense || (low_rank_too && t.kind == TermKind::kLowRank);
    });
    const int64_t side_by_side = m.residual.values ? kTile : thin ? kSideBySide : 1;
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), batch));
    const int64_t share = (batch + threads - 1) / threads;
    together = std::max<int64_t>(1, std::min(share, side_by_side));
    tile = std::max<int64_t>(1, std::min<int64_t>(share, std::max(side_by_side, kSideBySide)));
    count = (batch + tile - 1) / tile;
    workers = std::max<int64_t>(1, std::min(threads, count));
  }
  // Calls f(worker, b0, b1) for the tiles of samples [b0, b1).
  template <class F> void each(int64_t batch, const F& f) const {
    parallel(workers, [&](int64_t worker) {
      for (int64_t i = worker; i < count; i += workers) f(worker, i * tile, std::min(batch, (i + 1) * tile));
    });
  }
};

template <class T> void copy_all(const Optional& from, const Tensor& to) {
  if (from) std::copy_n(data<T>(*from), from->numel(), writable<T>(to));
  else std::fill_n(writable<T>(to), to.numel(), T(0));
}

// W_ih of a layer in eight bits, and a sparse residual.
struct Int8Input {
  CheckedInt8 matrix;
  std::optional<PackedMatrix<float>> rest;

  Int8Input(const Tensor& packed, const std::vector<int64_t>& layout, const Optional& residual, const Optional& index)
      : matrix(packed, layout) {
    const Int8Matrix& m = matrix.matrix;
    const Optional none;
    if (residual || index)
      rest.emplace(MatrixTensors{{}, none, residual, index, none, {m.gates, m.rows, m.cols, 0, 0}},
          Place{false, 0, ScalarType::Float});
  }
  void write(int64_t count, const float* x, const float* constant, float* gates, int64_t ld) const {
    matrix.multiply(count, x, constant, gates, ld, rest ? &rest->matrix : nullptr);
  }
};

struct Int8Layer {
  CheckedInt8 recurrent;
  std::optional<Int8Input> input = std::nullopt;

  void check(Kind kind, int64_t hidden) const {
    auto is_of = [&](const char* what, const Int8Matrix& m) {
      STD_TORCH_CHECK(m.gates == gates_of(kind) && m.rows == hidden, "kruify::int8_recurrence: ", what, " has ",
          m.gates, " gates of ", m.rows, " rows, kind '", kKindNames[kind], "' ", gates_of(kind), " of ", hidden);
    };
    is_of("the recurrent matrix", recurrent.matrix);
    STD_TORCH_CHECK(recurrent.matrix.cols == hidden, "kruify::int8_recurrence: the recurrent matrix has ",
        recurrent.matrix.cols, " columns, the state ", hidden);
    if (input) is_of("the input matrix", input->matrix.matrix);
  }
};

// The input's share of the gates, x W_ih^T and all that is constant over time.
template <class T> class InputShare {
 public:
  InputShare(const ForwardCall& call, const Matrix<T>& m, Kind kind, const Int8Input* int8)
      : int8_(int8),
        w_(data<T>(call.w_ih)),
        inputs_(call.x.size(1)),
        width_(call.width),
        rows_(call.rows()),
        constant_(width_) {
    std::fill_n(constant_.data(), width_, T(0));
    if (call.bias_ih) kernels<T>().axpy(width_, data<T>(*call.bias_ih), constant_.data());
    // The GRU's last gate adds its own inside r * (...).
    if (m.bias) kernels<T>().axpy(kind == kGru ? 2 * call.hidden : width_, m.bias, constant_.data());
    if (w_ && rows_ > kFewRows) packed_.emplace(inputs_, width_, Operand<T>{w_, inputs_, true});
  }
  void write(int64_t count, const T* x, T* gates, int64_t ld) const {
    const T* constant = constant_.data();
    if constexpr (sizeof(T) == 4)
      if (int8_) return int8_->write(count, x, constant, gates, ld);
    if (packed_) packed_->multiply(count, {x, inputs_, false}, constant, gates, ld);
    else if (w_ && rows_ > 4) multiply_by_panels(count, width_, inputs_, x, w_, constant, gates, ld);
    else if (w_) kernels<T>().thin_gemm(count, width_, inputs_, x, w_, constant, gates, ld);
    else
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(x + i * width_, width_, gates + i * ld);
        kernels<T>().axpy(width_, constant, gates + i * ld);
      }
  }

 private:
  const Int8Input* int8_;
  const T* w_;
  int64_t inputs_, width_, rows_;
  Buffer<T> constant_;
  std::optional<PackedB<T>> packed_;
};

template <class T> States run(const ForwardTensors& given, const Place& place, const Int8Layer* int8 = nullptr) {
  const Kind kind = given.kind;
  const PackedMatrix<T> w(given.matrix, place, rows_per_bias(kind), given.batch_sizes.numel() >= kManySteps);
  const Int8Input* input = int8 && int8->input ? &*int8->input : nullptr;
  const ForwardCall call(given, w.matrix, place, input ? input->matrix.matrix.cols : 0);
  if (int8) int8->check(kind, call.hidden);
  const int64_t rows = call.rows(), batch = call.batch, H = call.hidden, width = call.width;
  copy_all<T>(call.h0, call.h);
  if (call.c0) copy_all<T>(call.c0, call.c);
  if (rows == 0) return {call.out, call.h, call.c, call.workspace};

  Sequence<T> s = sequence_of(call, w.matrix, kind, given.reverse);
  s.training = given.training;
  s.h = writable<T>(call.h), s.c = writable<T>(call.c), s.out = writable<T>(call.out);
  if (int8) s.int8 = &int8->recurrent.matrix;
  const InputShare<T> inputs(call, s.matrix, kind, input);
  const bool in_workspace = given.training && s.saved > 0, in_out = width == H && !in_workspace;
  // A row of gates: those of the workspace but for c, so that the GRU has room for W_hn h + b_hn beside n.
  s.gates_ld = in_workspace ? s.saved * H : kind == kGru ? 4 * H : width;
  const int64_t at_once = int8 ? CheckedInt8::kRows * torch::stable::get_num_threads()
      : rows <= kFewRows       ? rows
                               : chunk_rows<T>(width, 48);
  const int64_t most = std::min(rows, std::max(at_once, batch));
  Buffer<T> gates(in_out || in_workspace ? 0 : most * s.gates_ld);

  const Tiles tiles(batch, w.matrix, true, int8 != nullptr);
  s.together = tiles.together;
  const int64_t scratch_size = w.matrix.scratch + 16 + (int8 ? int8_scratch(*s.int8, tiles.together) : 0);
  Buffer<T> scratch(tiles.workers * scratch_size);
  for (int64_t done = 0; done < s.steps;) {
    const auto [t0, t1] = chunk_of(s, done, most, s.reverse);
    done += t1 - t0;
    const int64_t first = s.first_row = call.starts[t0];
    s.gates = in_out   ? s.out + first * H
        : in_workspace ? writable<T>(call.workspace) + first * s.gates_ld
                       : gates.data();
    inputs.write(call.starts[t1] - first, data<T>(call.x) + first * call.x.size(1), s.gates, s.gates_ld);
    tiles.each(batch, [&, t0 = t0, t1 = t1](int64_t worker, int64_t b0, int64_t b1) {
      kernels<T>().forward(s, t0, t1, b0, b1, scratch.data() + worker * scratch_size);
    });
  }
  return {call.out, call.h, call.c, call.workspace};
}

States forward(const ForwardTensors& given) {
  const Place place = place_of("recurrence", given.x);
  return typed(place, [&](auto zero) { return run<decltype(zero)>(given, place); });
}

// batch_sizes of x (steps, batch, features).
Tensor steps_of(const Tensor& x) {
  const int64_t steps = x.size(0), stride = 1;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &steps, &stride, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &result));
  const Tensor sizes(result);
  std::fill_n(writable<int64_t>(sizes), steps, x.size(1));
  return sizes;
}

// Without `batch_sizes` x is (steps, batch, features), and so is what comes out. States may be (1, batch, size).
std::tuple<Tensor, Tensor, Tensor> int8_recurrence(const Tensor& x_given, const Optional& input,
    const std::vector<int64_t>& input_layout, const Optional& input_residual, const Optional& input_index,
    const Optional& bias_ih, const Optional& batch_sizes, const Tensor& h0, const Optional& c0, const Tensor& recurrent,
    const std::vector<int64_t>& recurrent_layout, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& residual, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
    const std::string& kind_name, bool reverse) {
  const Kind kind = kind_of(kind_name);
  STD_TORCH_CHECK(!is_modrelu(kind), "kruify::int8_recurrence does not take kind '", kind_name, "'");
  const Place place{false, 0, ScalarType::Float};
  Int8Layer int8{CheckedInt8(recurrent, recurrent_layout)};
  if (input) int8.input.emplace(*input, input_layout, input_residual, input_index);
  const Optional none;
  const bool whole = !batch_sizes;
  const Tensor x = whole ? checked("x", x_given, place, -1, -1, -1) : x_given;
  const Tensor rows = whole ? reshaped(x, {times(x.size(0), x.size(1)), x.size(2)}) : x;
  const Tensor sizes = whole ? steps_of(x) : *batch_sizes;
  const bool layered = h0.dim() == 3;
  auto flat = [&](const Tensor& state) {
    return layered && state.dim() == 3 ? reshaped(state, {state.size(1), state.size(2)}) : state;
  };
  auto as_given = [&](const Tensor& state) {
    return layered && state.dim() == 2 ? reshaped(state, {1, state.size(0), state.size(1)}) : state;
  };
  const Optional flat_c0 = c0 ? Optional(flat(*c0)) : none;
  const auto [out, h, c, workspace] =
      run<float>({rows, none, bias_ih, sizes, flat(h0), flat_c0, {stages, diagonal, residual, index, bias, layout},
                     kind, reverse, false, kFloat32},
          place, &int8);
  return {whole ? reshaped(out, {x.size(0), x.size(1), out.size(1)}) : out, as_given(h), as_given(c)};
}

// What the gradients of the gates are for: with W_ih those of x, W_ih and b_ih as far as they are needed, without it
// they are themselves those of x.
struct InputTensors {
  const Tensor& x;
  const Optional& w_ih;
  bool needs_x, needs_w_ih, needs_bias_ih;
};

struct Gradients {
  Tensor x, w_ih, bias_ih, h0, c0;
  std::vector<Tensor> matrix;
};

template <class T>
Gradients run_backward(const BackwardTensors& given, const InputTensors* inputs, const Place& place) {
  const Kind kind = given.kind;
  const PackedMatrix<T> w(given.matrix, place, rows_per_bias(kind));
  const BackwardCall call(given, w.matrix, place);
  const int64_t rows = call.rows(), batch = call.batch, width = call.width;
  const bool projected = inputs && inputs->w_ih, needs_bias = inputs && inputs->needs_bias_ih;
  const bool needs_x = projected && inputs->needs_x, needs_w = projected && inputs->needs_w_ih;
  Optional x, w_ih;
  if (projected) {
    w_ih = checked("w_ih", *inputs->w_ih, place, width, -1);
    x = checked("x", inputs->x, place, rows, w_ih->size(1));
  }
  const int64_t columns = projected ? w_ih->size(1) : width;
  Gradients grads{.x = empty(call.out, {needs_x || !projected ? rows : 0, columns}),
      .w_ih = projected ? empty(call.out, {needs_w ? width : 0, columns}) : empty(call.out, {0}),
      .bias_ih = empty(call.out, {needs_bias ? width : 0}),
      .h0 = call.grad_h0,
      .c0 = call.grad_c0,
      .matrix = {}};
  copy_all<T>(call.grad_h, grads.h0);
  copy_all<T>(call.grad_c, grads.c0);

  Sequence<T> s = sequence_of(call, w.matrix, kind, given.reverse);
  s.grad_out = data<T>(call.grad_out), s.workspace = data<T>(call.workspace), s.out_in = data<T>(call.out);
  s.h0 = data<T>(call.h0), s.c0 = data<T>(call.c0);
  s.grad_h = writable<T>(grads.h0), s.grad_c = call.c0 ? writable<T>(grads.c0) : nullptr;
  const Tiles tiles(batch, w.matrix, false);
  s.together = tiles.together;
  // A chunk's gradients are used while they are in the cache; where they are an output they are one chunk. The 16 keep
  // rows from lying a power of two apart, where elements of one column would share few cache lines.
  s.gates_ld = projected ? width + 16 : width;
  const int64_t most = projected ? std::min(rows, std::max(chunk_rows<T>(width, 64), batch)) : rows;
  Buffer<T> gates(projected ? most * s.gates_ld : 0);
  s.grad_gates = projected ? gates.data() : writable<T>(grads.x);
  const int64_t scratch_size = w.matrix.scratch + (kind == kGru ? tiles.together * s.gates_ld : 0) + 16;
  const int64_t arena_size = w.matrix.grad_size;
  Buffer<T> arenas(tiles.workers * arena_size), scratch(tiles.workers * scratch_size);
  std::fill_n(arenas.data(), tiles.workers * arena_size, T(0));
  // Both biases enter the gates alike, except for the GRU's last gate and modReLU.
  const bool same_bias = s.matrix.bias && kind != kGru;
  if (needs_bias) std::fill_n(writable<T>(grads.bias_ih), width, T(0));
  if (rows == 0) std::fill_n(writable<T>(grads.w_ih), grads.w_ih.numel(), T(0));
  std::optional<PackedB<T>> packed_ih;
  if (needs_x) packed_ih.emplace(width, columns, Operand<T>{data<T>(*w_ih), columns, false});

  for (int64_t done = 0; done < s.steps && rows;) {
    const auto [t0, t1] = chunk_of(s, done, most, !s.reverse);
    const int64_t first = s.first_row = call.starts[t0], count = call.starts[t1] - first;
    tiles.each(batch, [&, t0 = t0, t1 = t1](int64_t worker, int64_t b0, int64_t b1) {
      kernels<T>().backward(
          s, t0, t1, b0, b1, arenas.data() + worker * arena_size, scratch.data() + worker * scratch_size);
    });
    if (needs_x)
      packed_ih->multiply(
          count, {s.grad_gates, s.gates_ld, false}, nullptr, writable<T>(grads.x) + first * columns, columns);
    if (needs_w)
      PackedB<T>(count, columns, {data<T>(*x) + first * columns, columns, false})
          .multiply(width, {s.grad_gates, s.gates_ld, true}, nullptr, writable<T>(grads.w_ih), columns, done > 0);
    for (int64_t i = 0; needs_bias && !same_bias && i < count; ++i)
      kernels<T>().axpy(width, s.grad_gates + i * s.gates_ld, writable<T>(grads.bias_ih));
    done += t1 - t0;
  }
  grads.matrix = w.collect(arenas.data(), tiles.workers);
  if (needs_bias && same_bias) copy_all<T>(grads.matrix.back(), grads.bias_ih);
  return grads;
}

Gradients backward(const BackwardTensors& given, const InputTensors* inputs) {
  const Place place = place_of("recurrence_backward", given.out);
  return typed(place, [&](auto zero) { return run_backward<decltype(zero)>(given, inputs, place); });
}

StateGradients backward_to_gates(const BackwardTensors& given) {
  Gradients g = backward(given, nullptr);
  return {g.x, g.h0, g.c0, std::move(g.matrix)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> layer_backward(const Optional& grad_out,
    const Optional& grad_h, const Optional& grad_c, const Tensor& x, const Optional& w_ih, const Tensor& out,
    const Tensor& workspace, const Tensor& batch_sizes, const Tensor& h0, const Optional& c0,
    const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& residual, const Optional& index,
    const Optional& bias, const std::vector<int64_t>& layout, const std::string& kind, bool reverse, bool needs_x,
    bool needs_w_ih, bool needs_bias_ih, int64_t precision) {
  const InputTensors inputs{x, w_ih, needs_x, needs_w_ih, needs_bias_ih};
  Gradients g =
      backward({grad_out, grad_h, grad_c, out, workspace, batch_sizes, h0, c0,
                   {stages, diagonal, residual, index, bias, layout}, kind_of(kind), reverse, precision_of(precision)},
          &inputs);
  return {g.x, g.w_ih, g.bias_ih, g.h0, g.c0, std::move(g.matrix)};
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&kruify::recurrence<kruify::forward>));
  m.impl("recurrence_forward", TORCH_BOX(&kruify::recurrence<kruify::forward>));
  m.impl("recurrence_backward", TORCH_BOX(&kruify::recurrence_backward<kruify::backward_to_gates>));
  m.impl("layer_backward", TORCH_BOX(&kruify::layer_backward));
  m.impl("int8_recurrence", TORCH_BOX(&kruify::int8_recurrence));
}
