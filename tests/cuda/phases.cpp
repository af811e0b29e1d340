// Runs the CUDA kernels' phases on the CPU: every thread of every block, one phase after the other, in a chosen order,
// and the host code that picks and orders the launches. Built by the tests with the C++ compiler alone, no part of
// kruify.
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda/schedule.h"
#include "emulation.h"
#include "layout.h"
#include "races.h"

using namespace kruify;
using namespace kruify::cuda;

namespace {

// A cluster of blocks. Memory starts as NaN, so that reading what nobody wrote shows in the result.
//
// Phases are kept until a barrier demands their results; then every thread goes as far as it may before the next one
// starts, and, in a cluster, every block before the next one. A missing barrier thus shows too: a thread that runs
// ahead finds what the others have not written yet, or overwrites what they have not read. Copies from global memory
// arrive when their thread waits for them. Built with KRUIFY_RACES (races.h), every access of every thread is compared
// with the others'.
struct HostBlock {
  int threads, ranks, order;  // order 0: threads ascending; 1: descending; 2: scattered
  int skipped;                // which barrier, from 1, is none for races.h
  size_t size;                // of a block's memory, in bytes
  std::vector<std::unique_ptr<double[]>> memory;
  std::vector<Copies> on_their_way;  // of the threads of all ranks
  struct Phase {
    std::function<void(const Thread&)> run;
    races::Place place;
  };
  std::vector<std::vector<Phase>> waiting{{}};  // phases, one list between two barriers of a block
  races::Place place{};
  int barriers = 0;
  bool arrival_skipped = false;
  size_t arrived = 0;  // lists that every block has behind it at the cluster's arrival
  std::vector<int64_t> products = std::vector<int64_t>(1024);  // of tensor cores that each thread took part in
  inline static bool warps_agree = true;
  inline static int most_barriers = 0;  // of any block so far

  HostBlock(int threads, int ranks, int64_t bytes, int order, int skipped = 0)
      : threads(threads),
        ranks(ranks),
        order(order),
        skipped(skipped),
        size(bytes / 8 * 8 + 16),
        on_their_way(threads * ranks) {
    for (int r = 0; r < ranks; ++r) {
      memory.emplace_back(new double[size / 8]);
      std::memset(memory.back().get(), 0xff, size);
      races::own(memory.back().get(), size);
    }
    races::own(on_their_way.data(), on_their_way.size() * sizeof(Copies));
    races::ignore(&emulated, sizeof emulated);
  }
  template <class State> struct PerThread {
    std::vector<State> states = std::vector<State>(1024);
    PerThread() { races::own(states.data(), states.size() * sizeof(State)); }
    State& of(const Thread& t) { return states[t.id]; }
  };
  void each(std::function<void(const Thread&)> phase) { waiting.back().push_back({std::move(phase), place}); }
  void barrier() {
    const bool real = ++barriers != skipped;
    place.interval += real;
    if (ranks == 1) run(waiting.size(), real);
    else waiting.emplace_back();
  }
  void cluster_barrier() {
    const bool real = ++barriers != skipped;
    place.interval += real, place.arrived += real, place.waited += real;
    run(waiting.size(), real);
  }
  void cluster_arrive() {
    if (ranks == 1) return;
    arrival_skipped = ++barriers == skipped;
    place.arrived += !arrival_skipped;
    waiting.emplace_back();
    arrived = waiting.size() - 1;
  }
  void cluster_wait() {
    if (ranks == 1) return;
    place.waited += !arrival_skipped;
    run(arrived, false);  // nobody passes before all have arrived, but what lies between may run late
  }
  void end() {
    run(waiting.size(), false);
    for (int r = 0; r < ranks && ranks > 1; ++r)
      races::gone(r, memory[r].get(), size, {r, -1, place.interval, place.arrived, place.waited});
    races::meet();
    most_barriers = std::max(most_barriers, barriers);
  }
  // The first lists, block by block, list by list, thread by thread. `met`: all threads are at one place then.
  void run(size_t lists, bool met) {
    for (int r = 0; r < ranks; ++r) {
      const int rank = order == 1 ? ranks - 1 - r : r;
      for (size_t list = 0; list < lists; ++list) {
        int step = 7;
        while (std::gcd(step, threads) != 1) ++step;
        for (int k = 0; k < threads; ++k) {
          const int id = order == 0 ? k
              : order == 1          ? threads - 1 - k
                                    : static_cast<int>(static_cast<int64_t>(k) * step % threads);
          const Thread thread{id, threads, rank, ranks, reinterpret_cast<char*>(memory[rank].get())};
          const int64_t before = emulated;
          copies = &on_their_way[rank * threads + id];
          for (const Phase& phase : waiting[list]) {
            races::enter({rank, id, phase.place.interval, phase.place.arrived, phase.place.waited});
            phase.run(thread);
            races::leave();
          }
          copies = nullptr;
          products[id] = emulated - before;
        }
        for (int id = 0; id < threads; ++id)  // mma.sync hangs where lanes of a warp go different ways
          if (products[id] != products[id / 32 * 32]) warps_agree = false;
      }
    }
    waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(lists));
    if (waiting.empty()) waiting.emplace_back();
    arrived = 0;
    if (met) races::meet();
  }
  template <class T> T* remote(const Thread& t, int rank, T* local) const {
    return reinterpret_cast<T*>(
        reinterpret_cast<char*>(memory[rank].get()) + (reinterpret_cast<char*>(local) - t.memory));
  }
};

// The template of a plan, float32 or for tensor cores.
template <class F> void with_any_template(AnyShape s, bool fixed, const PairPlan& p, Kind kind, const F& f) {
  if (p.precision == kFloat32) with_template<false>(s, fixed, p, kind, f);
  else with_template<true>(s, fixed, p, kind, f);
}

struct Options {  // mirrored in conftest.py
  int processors, shared_memory, clusters;
  int order, cluster, tile, fixed, precision;  // cluster, tile: 0 for what the plan says
  int skipped;                                 // a barrier that races.h does not count, from 1; 0: none
};

struct HostMachine {
  Chip chip;
  Options options;
  std::vector<std::unique_ptr<char[]>> memory;
  int pairs = 0, generals = 0,
      tensors = 0;  // launches of the templates, of the general kernels, of those on tensor cores

  explicit HostMachine(const Options& o) : chip{o.processors, o.shared_memory, o.clusters != 0}, options(o) {}

  template <class T> T* scratch(int64_t n) {
    memory.emplace_back(new char[n * sizeof(T) + 16]);
    std::memset(memory.back().get(), 0xff, n * sizeof(T) + 16);
    return reinterpret_cast<T*>(memory.back().get());
  }
  const int* upload(const std::vector<int>& values) {
    int* to = scratch<int>(values.size());
    std::copy(values.begin(), values.end(), to);
    return to;
  }
  template <class Item> void run(const Item& item) {
    const int64_t n = item.items();
    races::launch();
    for (int64_t k = 0; k < n; ++k) {
      const int64_t number = options.order ? n - 1 - k : k;
      races::unit(number);
      races::enter({});
      run_one(item, number);
      races::leave();
      races::meet();
    }
  }
  template <class Item> [[gnu::noinline]] static void run_one(const Item& item, int64_t number) { item.run(number); }
  template <class T> void sort_columns(SparseResidual<T>& s) {
    int* sorted = scratch<int>(s.blocks);
    int64_t* from = scratch<int64_t>(s.blocks);
    std::iota(from, from + s.blocks, 0);
    std::stable_sort(
        from, from + s.blocks, [&](int64_t i, int64_t j) { return s.index[2 * i + 1] < s.index[2 * j + 1]; });
    for (int k = 0; k < s.blocks; ++k) sorted[k] = s.index[2 * from[k] + 1];
    s.by_column = sorted, s.blocks_by_column = from;
  }
  PairPlan forced(AnyShape s, Kind kind, PairPlan p, bool backward) const {
    if (options.cluster) p = pair_layout(s, gates_of(kind), p.rank, options.cluster, backward, p.precision);
    if (options.tile) p.tile = options.tile;
    return p;
  }
  template <class Arguments> void pair_recurrence(AnyShape s, const PairPlan& plan, const Arguments& args) {
    ++pairs, tensors += plan.precision != kFloat32;
    const PairPlan p = forced(s, args.kind, plan, std::is_same_v<Arguments, PairBackward>);
    races::launch();
    for (int sample = 0; sample < args.rows.batch; ++sample) {
      races::unit(sample);
      HostBlock block(p.threads, p.cluster, p.bytes, options.order, options.skipped);
      with_any_template(s, options.fixed, p, args.kind, [&](auto g, auto numbers, auto shape) {
        cuda::pair_recurrence<g.value, decltype(numbers)>(block, shape, p, args, sample);
      });
    }
  }
  template <class T, class Arrays> void general_recurrence(const Program<T>& m, const Arrays& args) {
    ++generals;
    races::launch();
    for (int sample = 0; sample < args.rows.batch; ++sample) {
      races::unit(sample);
      HostBlock block(64, 1, general_scratch(m) * int64_t(sizeof(T)), options.order, options.skipped);
      with_gates(args.kind, [&](auto g) { cuda::general_recurrence<g.value>(block, m, args, sample); });
    }
  }
  void pair_product(AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward) {
    ++pairs, tensors += p.precision != kFloat32;
    races::launch();
    for (int k = 0; k < 3; ++k)
      with_precision(p.precision, [&](auto numbers) {
        races::unit(k);
        HostBlock block(p.threads, 1, p.bytes, options.order, options.skipped);
        if (backward) pair_product_backward<decltype(numbers)>(block, s, p, args, k, 3);
        else cuda::pair_product<decltype(numbers)>(block, s, p, args, k, 3);
      });
  }
  void pair_gradient(AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank) {
    ++pairs, tensors += p.precision != kFloat32;
    races::launch();
    for (int r = 0; r < rank; ++r)
      for (int piece = 0; piece < pieces; ++piece) {
        races::unit(static_cast<int64_t>(r) * pieces + piece);
        HostBlock block(p.threads, 1, p.bytes, options.order, options.skipped);
        const PairGradient own = piece_of(args, s, p, piece, pieces, r);
        with_precision(p.precision, [&](auto numbers) { cuda::pair_gradient<decltype(numbers)>(block, s, p, own); });
      }
  }
};

struct Problem {  // mirrored in conftest.py
  const int64_t* code;
  const int* shapes;  // rank, P, Q of every stage
  const void* const* stages;
  const void *diagonal, *residual, *bias;
  const int *index, *starts;  // starts: first row of each step, or null
  int codes, stage_count, blocks, block, kind, steps, batch, reverse;
};

template <class T> struct HostMatrix {
  std::vector<Term<T>> terms;
  Matrix<T> matrix{};

  explicit HostMatrix(const Problem& p) {
    read_layout({p.code, p.code + p.codes}, matrix, terms);
    int k = 0;
    for (auto& term : terms)
      for (int f = 0; f < term.stages; ++f, ++k) {
        term.rank = p.shapes[3 * k], term.p[f] = p.shapes[3 * k + 1], term.q[f] = p.shapes[3 * k + 2];
        term.w[f] = static_cast<const T*>(p.stages[k]);
      }
    matrix.diagonal = static_cast<const T*>(p.diagonal), matrix.bias = static_cast<const T*>(p.bias);
    matrix.residual = {static_cast<const T*>(p.residual), p.index, p.blocks, p.block};
  }
};

template <class T> MatrixGradient<T> gradient_of(const Problem& p, T* const* grads) {
  T* const* rest = grads + p.stage_count;
  return {{grads, rest}, rest[0], rest[1], rest[2]};
}

// Calls f(machine, matrix); returns how many launches it took of two-stage templates, and a thousand times those on
// tensor cores.
template <class T, class F> int launches(const Problem& p, const Options& o, const F& f) {
  HostMachine machine(o);
  HostMatrix<T> m(p);
  f(machine, m.matrix);
  return machine.pairs + 1000 * machine.tensors;
}

Rows rows_of(const Problem& p) { return {p.starts, p.steps, p.batch, p.reverse != 0}; }

template <class T> int forward(const Problem& p, const Options& o, const T* const* in, T* const* out) {
  const ForwardArrays<T> arrays{.x = in[0],
      .h0 = in[1],
      .c0 = in[2],
      .out = out[0],
      .h_last = out[1],
      .c_last = out[2],
      .workspace = out[3],
      .rows = rows_of(p)};
  return launches<T>(p, o,
      [&](HostMachine& machine, auto& m) { recurrence(machine, m, Kind(p.kind), arrays, Precision(o.precision)); });
}

template <class T>
int backward(const Problem& p, const Options& o, const T* const* in, T* const* out, T* const* grads, int64_t rows) {
  const BackwardArrays<T> arrays{.grad_out = in[0],
      .grad_h = in[1],
      .grad_c = in[2],
      .out = in[3],
      .workspace = in[4],
      .h0 = in[5],
      .c0 = in[6],
      .grad_gates = out[0],
      .grad_h0 = out[1],
      .grad_c0 = out[2],
      .rows = rows_of(p)};
  return launches<T>(p, o, [&](HostMachine& machine, auto& m) {
    recurrence_backward(machine, m, Kind(p.kind), arrays, rows, gradient_of(p, grads), Precision(o.precision));
  });
}

template <class T> int multiply(const Problem& p, const Options& o, const T* x, T* y, int64_t rows) {
  return launches<T>(
      p, o, [&](HostMachine& machine, auto& m) { product(machine, m, x, rows, y, Precision(o.precision)); });
}

template <class T>
int multiply_backward(
    const Problem& p, const Options& o, const T* grad, const T* x, T* grad_x, T* const* grads, int64_t rows) {
  return launches<T>(p, o, [&](HostMachine& machine, auto& m) {
    product_backward(machine, m, grad, x, rows, grad_x, gradient_of(p, grads), Precision(o.precision));
  });
}

// A chain of `count` factors, each (pairs, P, Q).
template <class T> Chain<T> chain_of(int pairs, int count, const int* shapes, const T* const* factors) {
  Chain<T> chain{};
  chain.pairs = pairs;
  for (int k = 0; k < count; ++k) chain.add(factors[k], shapes[2 * k], shapes[2 * k + 1]);
  return chain;
}

std::string last_error;

// What the call returns, or -1 and its error kept.
template <class F> int guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

extern "C" const char* what() { return last_error.c_str(); }

// Each returns what `launches` does, but for the last two.
#define EXPORT(T)                                                                                                \
  extern "C" int forward_##T(const Problem* p, const Options* o, const T* const* in, T* const* out) {            \
    return guarded([&] { return forward(*p, *o, in, out); });                                                    \
  }                                                                                                              \
  extern "C" int backward_##T(                                                                                   \
      const Problem* p, const Options* o, const T* const* in, T* const* out, T* const* grads, int64_t rows) {    \
    return guarded([&] { return backward(*p, *o, in, out, grads, rows); });                                      \
  }                                                                                                              \
  extern "C" int multiply_##T(const Problem* p, const Options* o, const T* x, T* y, int64_t rows) {              \
    return guarded([&] { return multiply(*p, *o, x, y, rows); });                                                \
  }                                                                                                              \
  extern "C" int multiply_backward_##T(                                                                          \
      const Problem* p, const Options* o, const T* grad, const T* x, T* grad_x, T* const* grads, int64_t rows) { \
    return guarded([&] { return multiply_backward(*p, *o, grad, x, grad_x, grads, rows); });                     \
  }                                                                                                              \
  extern "C" int merge_##T(                                                                                      \
      int pairs, int count, const int* shapes, const T* const* factors, const Options* o, T* out) {              \
    HostMachine machine(*o);                                                                                     \
    machine.run(MergeChain<T>{chain_of(pairs, count, shapes, factors), out});                                    \
    return 0;                                                                                                    \
  }                                                                                                              \
  extern "C" int merge_backward_##T(int pairs, int count, const int* shapes, const T* const* factors,            \
      const Options* o, const T* grad, T* const* to) {                                                           \
    HostMachine machine(*o);                                                                                     \
    chain_backward(machine, chain_of(pairs, count, shapes, factors), grad, std::vector<T*>(to, to + count));     \
    return 0;                                                                                                    \
  }
EXPORT(float)
EXPORT(double)

// cluster, threads, tile, bytes and precision that a launch takes on a chip; cluster 0: none fits.
extern "C" void pair_choice(
    int kind, int P1, int P2, int rank, int batch, const Options* o, int backward, int* choice) {
  const PairPlan p = pair_plan(AnyShape{P1, P1, P2, P2}, gates_of(Kind(kind)), rank, batch,
      {o->processors, o->shared_memory, o->clusters != 0}, backward, Precision(o->precision));
  choice[0] = p.cluster, choice[1] = p.threads, choice[2] = p.tile, choice[3] = p.bytes, choice[4] = p.precision;
}

// Whether in all calls so far every lane of a warp took part in every product of its tensor core.
extern "C" int warps_agree() { return HostBlock::warps_agree; }

// One lane's share of an mma: left (32 lanes, 4 words), right (32 lanes, 2 words), c (4,).
extern "C" void mma_lane(int precision, int lane, const uint32_t* left, const uint32_t* right, float* c) {
  Left a[32];
  Right b[32];
  std::memcpy(a, left, sizeof a), std::memcpy(b, right, sizeof b);
  float sum[4];
  std::copy_n(c, 4, sum);
  if (precision == kTf32) emulate_mma(Tf32{}, lane, sum, a, b);
  else emulate_mma(Bf16{}, lane, sum, a, b);
  std::copy_n(sum, 4, c);
}

// n numbers as a template keeps them, in words.
extern "C" void rounded(int precision, const float* from, int n, float* to) {
  for (int k = 0; k < n; ++k)
    if (precision == kTf32) Tf32::put(to, k, from[k]);
    else Bf16::put(to, k, from[k]);
}

// Races since the last call; what the last one was; the most barriers that a block has met since the last call.
extern "C" int64_t races_found() { return races::found(); }
extern "C" const char* race() { return races::example(); }
extern "C" int barriers() { return std::exchange(HostBlock::most_barriers, 0); }

extern "C" int fits(int gates, int rank, int rows1, int rows2, int training, const Options* o) {
  const Chip chip{o->processors, o->shared_memory, o->clusters != 0};
  return pair_fits(AnyShape{rows1, rows1, rows2, rows2}, gates, rank, chip, training != 0, Precision(o->precision));
}
