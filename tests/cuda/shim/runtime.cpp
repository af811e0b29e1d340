// A GPU on the CPU: whole launches of the unmodified kernels, in one thread of the CPU.
//
// Every GPU thread is a fiber that runs until it waits at a barrier, then the next one; a block has real barriers, a
// cluster too. Dynamic shared memory has the launch's size, starts as NaN and ends at a guard page, and so does all
// that the operators allocate. cp.async arrives as late as it may; mma.sync needs all 32 lanes. What no GPU would take
// fails: grids and attributes beyond its limits, an arrival without a wait, the memory of a block that has ended, a
// deadlock. What it cannot show: instructions in asm, the strength of the memory model, real streams, graphs, speed.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/mma.h"
#include "races.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

namespace {

struct Chip {
  int processors, shared_memory, major, order;  // order of the threads: 0 ascending, 1 descending, 2 shuffled
};
std::vector<Chip> chips{{132, 232448, 9, 0}};
int device = 0;

std::map<std::pair<int, const void*>, int> allowance;  // shared memory of a kernel on a device
int64_t attribute_calls = 0, tensor_products = 0;
std::string launches;  // a line each
int skipped = 0, most_barriers = 0;

// A bug to be found by the tests: what a kernel with a wrong index or an unwritten number would do.
enum Planted { kNoBug, kLostFetch, kFetchOneOff, kOtherBlock, kOtherLane };
int planted = kNoBug;

constexpr size_t kStack = 128 * 1024, kPage = 4096;

// Memory between two pages that nobody may touch; it ends where the second one begins.
struct Pages {
  char* first;
  size_t size;
  Pages(size_t bytes, char** end) : size((bytes + kPage - 1) / kPage * kPage + 2 * kPage) {
    first = static_cast<char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    *end = first + size - kPage;
    mprotect(first, kPage, PROT_NONE), mprotect(*end, kPage, PROT_NONE);
  }
  Pages(const Pages&) = delete;
  ~Pages() { munmap(first, size); }
};

struct Fiber {
  char* end;
  Pages stack{kStack, &end};
  ucontext_t start;
  jmp_buf at;
  bool started = false;
};

enum Waits { kNothing, kWarp, kBlock, kCluster };

struct GpuThread {
  unsigned id, rank;
  Fiber* fiber = nullptr;
  bool done = false;
  Waits state = kNothing;
  int64_t until = 0;     // the generation of that barrier which lets it go on
  int64_t arrived = -1;  // the cluster's generation at its arrival, or -1
  bool arrival_skipped = false;
  int barriers = 0;
  races::Place place{};
  std::vector<std::pair<float*, const float*>> copies;  // by cp.async
  std::vector<size_t> groups;                           // where each group of copies ends
  size_t copied = 0, waited = 0;                        // copies and groups that have arrived
};

struct Words {  // what the lanes of a warp bring to a product
  kruify::cuda::Left left[32];
  kruify::cuda::Right right[32];
};
struct Warp {
  unsigned count = 0;
  int64_t generation = 0;
  Words words[2];
};
struct Block {
  std::unique_ptr<Pages> pages;
  char* memory = nullptr;  // dynamic shared memory
  size_t bytes = 0;
  unsigned count = 0, done = 0;
  int64_t generation = 0;
  std::vector<Warp> warps;
};

// The cluster that runs.
const Launch* launch = nullptr;
const std::function<void()>* kernel = nullptr;
std::vector<Block> blocks;
std::vector<GpuThread> threads;
int64_t cluster_generation = 0;
unsigned cluster_count = 0, cluster_passed = 0;
GpuThread* now = nullptr;
std::exception_ptr failure;
jmp_buf scheduler;
std::vector<Fiber*> idle;

Block& own() { return blocks[now->rank]; }
Warp& warp() { return own().warps[now->id / 32]; }

[[noreturn]] void wrong(const char* what) { throw std::runtime_error(std::string("shim: ") + what); }

// Back to the scheduler, until it resumes this fiber.
void yield() {
  if (!_setjmp(now->fiber->at)) _longjmp(scheduler, 1);
}
void wait(Waits state, int64_t until) {
  now->state = state, now->until = until;
  yield();
}

void fiber_main() {
  for (;;) {
    try {
      (*kernel)();
      if (now->arrived >= 0) wrong("a thread ended between arrival and wait");
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
    now->done = true, ++own().done;
    idle.push_back(now->fiber);
    yield();
  }
}

Fiber* new_fiber() {
  auto* fiber = new Fiber{};
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->end - kStack, fiber->start.uc_stack.ss_size = kStack;
  makecontext(&fiber->start, fiber_main, 0);
  return fiber;
}

bool ready(const GpuThread& t) {
  switch (t.state) {
    case kNothing: return true;
    case kWarp: return blocks[t.rank].warps[t.id / 32].generation >= t.until;
    case kBlock: return blocks[t.rank].generation >= t.until;
    default: return cluster_generation >= t.until;
  }
}

void resume(GpuThread& t) {
  now = &t, t.state = kNothing;
  threadIdx = dim3(t.id), blockIdx.x = blockIdx.x / launch->cluster * launch->cluster + t.rank;
  if (!t.fiber) {
    if (idle.empty()) idle.push_back(new_fiber());
    t.fiber = idle.back();
    idle.pop_back();
  }
  races::enter(&t.place, t.fiber->end - kStack, t.fiber->end);
  if (!_setjmp(scheduler)) {
    if (t.fiber->started) _longjmp(t.fiber->at, 1);
    t.fiber->started = true;
    setcontext(&t.fiber->start);
  }
  races::leave();
  now = nullptr;
}

// One thread after the other, each as far as it may. In order, a block goes on alone until it waits for another one.
void run_cluster(int order, std::vector<unsigned>& turn, std::mt19937& random) {
  const size_t part = order == 2 ? turn.size() : launch->threads;
  for (bool any = true; any && !failure;) {
    any = false;
    for (size_t first = 0; first < turn.size(); first += part)
      for (bool more = true; more && !failure; any |= more) {
        more = false;
        if (order == 2) std::shuffle(turn.begin(), turn.end(), random);
        for (size_t k = first; k < first + part && !failure; ++k) {
          GpuThread& t = threads[turn[k]];
          if (t.done || !ready(t)) continue;
          more = true;
          resume(t);
        }
      }
  }
  const bool done = std::all_of(threads.begin(), threads.end(), [](const GpuThread& t) { return t.done; });
  if (!failure && !done)
    failure = std::make_exception_ptr(std::runtime_error("shim: deadlock at a barrier that not all reach"));
}

}  // namespace

bool has_code() { return chips[device].major >= 8; }

cudaError_t allow(const void* function, int bytes) {
  ++attribute_calls;
  if (bytes > chips[device].shared_memory) return cudaErrorInvalidValue;
  allowance[{device, function}] = bytes;
  return cudaSuccess;
}

cudaError_t occupancy(int* count, const void* function, unsigned cluster, size_t bytes) {
  const Chip& chip = chips[device];
  if (chip.major < 9 || cluster > 8 || static_cast<int>(bytes) > allowance[{device, function}])
    return cudaErrorInvalidValue;
  *count = chip.processors / static_cast<int>(cluster);
  return cudaSuccess;
}

cudaError_t run(const Launch& l, const std::function<void()>& thread) {
  const Chip& chip = chips[device];
  const auto allowed = allowance.find({device, l.function});
  const size_t most = allowed == allowance.end() ? 48 * 1024 : allowed->second;
  if (!has_code()) return cudaErrorNoKernelImageForDevice;
  if (!l.grid.x || !l.grid.y || l.grid.x > 2147483647u || l.grid.y > 65535 || !l.threads || l.threads > 1024 ||
      l.threads % 32 || l.grid.x % l.cluster || l.cluster > (chip.major >= 9 ? 8 : 1) || l.bytes > most ||
      l.parameters > 4096)
    return cudaErrorInvalidValue;
  launches += std::to_string(l.grid.x * l.grid.y) + ' ' + std::to_string(l.threads) + ' ' + std::to_string(l.cluster) +
      ' ' + std::to_string(l.bytes) + ' ' + l.kernel + '\n';
  launch = &l, kernel = &thread, failure = nullptr;
  blockDim = dim3(l.threads), gridDim = l.grid;
  std::vector<unsigned> turn(l.threads * l.cluster);
  std::iota(turn.begin(), turn.end(), 0u);
  if (chip.order == 1) std::reverse(turn.begin(), turn.end());
  static std::mt19937 random(1);
  races::launch();
  blocks = std::vector<Block>(l.cluster);
  for (Block& b : blocks) {
    b.pages = std::make_unique<Pages>(l.bytes, &b.memory);
    b.memory -= l.bytes, b.bytes = l.bytes;
  }
  for (unsigned y = 0; y < l.grid.y && !failure; ++y)
    for (unsigned x = 0; x < l.grid.x && !failure; x += l.cluster) {
      races::unit(static_cast<int64_t>(y) * l.grid.x + x);
      blockIdx = dim3(x, y);
      cluster_generation = 0, cluster_count = cluster_passed = 0;
      threads.assign(turn.size(), GpuThread{});
      for (unsigned k = 0; k < threads.size(); ++k)
        threads[k].id = k % l.threads, threads[k].rank = k / l.threads,
        threads[k].place = {static_cast<int>(k / l.threads), static_cast<int>(k % l.threads), 0, 0, 0};
      for (Block& b : blocks) {
        std::memset(b.memory, 0xff, b.bytes);
        b.count = b.done = 0, b.generation = 0, b.warps.assign(l.threads / 32, Warp{});
        races::own(b.memory, b.bytes);
      }
      run_cluster(chip.order, turn, random);
      for (unsigned r = 0; r < l.cluster && l.cluster > 1; ++r) {
        races::Place end = threads[r * l.threads].place;
        end.thread = -1;
        races::gone(static_cast<int>(r), blocks[r].memory, l.bytes, end);
      }
      races::meet();
      most_barriers = std::max(most_barriers, threads[0].barriers);
    }
  blocks.clear();
  if (failure)  // what hangs in the middle of a kernel is left there
    for (GpuThread& t : threads)
      if (t.fiber && !t.done) delete t.fiber;
  launch = nullptr;
  if (failure) std::rethrow_exception(failure);
  return cudaSuccess;
}

}  // namespace shim

using namespace shim;

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available" : "invalid argument";
}
cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= static_cast<int>(chips.size())) return cudaErrorInvalidDevice;
  device = number;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const Chip& chip = chips.at(number);
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? chip.shared_memory
      : attribute == cudaDevAttrComputeCapabilityMajor          ? chip.major
                                                                : chip.processors;
  return cudaSuccess;
}

// A barrier that races.h does not count is passed all the same.
void __syncthreads() {
  const races::Pause pause;
  now->place.interval += ++now->barriers != skipped;
  const int64_t until = own().generation + 1;
  if (++own().count < launch->threads) return wait(kBlock, until);
  own().count = 0, ++own().generation;
  if (launch->cluster == 1 && now->barriers != skipped) races::meet();
  wait(kBlock, until);  // let the others go first or last, as the order has it
}
void __syncwarp() {
  const races::Pause pause;
  const int64_t until = warp().generation + 1;
  if (++warp().count < 32) return wait(kWarp, until);
  warp().count = 0, ++warp().generation;
}

namespace kruify::cuda {

char* emulate_shared_memory() { return own().memory; }
int emulate_cluster_rank() { return static_cast<int>(now->rank); }
int emulate_cluster_size() { return static_cast<int>(launch->cluster); }
void emulate_cluster_arrive() {
  const races::Pause pause;
  if (now->arrived >= 0) wrong("a second arrival without a wait");
  now->arrival_skipped = ++now->barriers == skipped;
  now->place.arrived += !now->arrival_skipped;
  now->arrived = cluster_generation;
  if (++cluster_count == threads.size()) cluster_count = 0, ++cluster_generation;
}
void emulate_cluster_wait() {
  const races::Pause pause;
  if (now->arrived < 0) wrong("a wait without an arrival");
  const int64_t until = std::exchange(now->arrived, -1) + 1;
  now->place.waited += !now->arrival_skipped;
  if (++cluster_passed == threads.size()) {
    cluster_passed = 0;
    if (!now->arrival_skipped) races::meet(now->place.waited);
  }
  wait(kCluster, until);
}
void* emulate_remote(int rank, void* local) {
  const races::Pause pause;
  Block& there = blocks.at(planted == kOtherBlock ? 0 : rank);
  char* place = static_cast<char*>(local);
  if (place < own().memory || place >= own().memory + own().bytes) wrong("mapa of an address outside shared memory");
  if (there.done) wrong("the shared memory of a block that has ended");
  return there.memory + (place - own().memory);
}

void emulate_fetch(float* shared, const float* global) {
  const races::Pause pause;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    wrong("cp.async of a misaligned address");
  races::access(shared, 16, true), races::access(global, 16, false);
  for (int i = 0; i < 4; ++i) shared[i] = NAN;
  now->copies.emplace_back(shared, global);
}
void emulate_commit() {
  const races::Pause pause;
  now->groups.push_back(now->copies.size());
}
void emulate_wait(int pending) {
  const races::Pause pause;
  for (; now->waited + pending < now->groups.size(); ++now->waited)
    for (; now->copied < now->groups[now->waited]; ++now->copied) {
      const auto& [to, from] = now->copies[now->copied];
      races::access(to, 16, true);
      if (planted != kLostFetch) std::memcpy(to, from, 16);
      if (planted == kFetchOneOff) std::rotate(to, to + 1, to + 4);
    }
}

namespace {

// The numbers of a word, low half first; what TF32 ignores is gone.
void numbers_of(Tf32, uint32_t word, float (&to)[2]) { to[0] = float_of(word & 0xffffe000u), to[1] = 0.0f; }
void numbers_of(Bf16, uint32_t word, float (&to)[2]) {
  to[0] = float_of(word << 16), to[1] = float_of(word & 0xffff0000u);
}

// What one lane gets of an mma, from the words that all 32 lanes bring.
template <class Format> void lane_of_mma(Format format, unsigned lane, float (&c)[4], const Words& words) {
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned w = 0; w < 8; ++w) {
      float a[2], b[2];
      const unsigned from = (row % 8 * 4 + w % 4) ^ (planted == kOtherLane);
      numbers_of(format, words.left[from].word[row / 8 + w / 4 * 2], a);
      numbers_of(format, words.right[column * 4 + w % 4].word[w / 4], b);
      c[i] += a[0] * b[0] + a[1] * b[1];
    }
  }
}

template <class Format> void meet_for_mma(Format format, float (&c)[4], const Left& a, const Right& b) {
  const races::Pause pause;
  const unsigned lane = now->id % 32;
  Words& words = warp().words[warp().generation & 1];  // the other one may still be read
  words.left[lane] = a, words.right[lane] = b;
  __syncwarp();
  lane_of_mma(format, lane, c, words);
  tensor_products += lane == 0;
}

}  // namespace

void mma(Tf32 format, float (&c)[4], const Left& a, const Right& b) { meet_for_mma(format, c, a, b); }
void mma(Bf16 format, float (&c)[4], const Left& a, const Right& b) { meet_for_mma(format, c, a, b); }

}  // namespace kruify::cuda

// What the tests ask for.
#define SHIM_API extern "C" __attribute__((visibility("default")))

// Another GPU from here on, as the operators see it: a device of its own, since they keep what they learn of one.
SHIM_API void shim_chip(int processors, int shared_memory, int major, int order) {
  for (device = 0; device < static_cast<int>(chips.size()); ++device) {
    const Chip& c = chips[device];
    if (c.processors == processors && c.shared_memory == shared_memory && c.major == major && c.order == order) return;
  }
  chips.push_back({processors, shared_memory, major, order});
}
SHIM_API int shim_device() { return device; }
// "blocks threads cluster bytes types" of every launch since the last call.
SHIM_API const char* shim_launches() {
  static std::string told;
  told = std::exchange(launches, {});
  return told.c_str();
}
SHIM_API int64_t shim_products() { return std::exchange(tensor_products, 0); }  // of tensor cores, by warps
SHIM_API int64_t shim_attribute_calls() { return std::exchange(attribute_calls, 0); }
SHIM_API void shim_watch(int yes) { races::watch(yes); }
SHIM_API int64_t shim_races() { return races::found(); }
SHIM_API const char* shim_race() { return races::example(); }
SHIM_API void shim_skip(int barrier) { skipped = barrier; }  // a barrier, from 1, that races.h does not count
SHIM_API void shim_plant(int bug) { planted = static_cast<Planted>(bug); }
SHIM_API int shim_barriers() { return std::exchange(most_barriers, 0); }  // the most of any thread

// n numbers as a template keeps them, in words.
SHIM_API void shim_rounded(int precision, const float* from, int n, float* to) {
  using namespace kruify::cuda;
  for (int k = 0; k < n; ++k)
    if (precision == kruify::kTf32) Tf32::put(to, k, from[k]);
    else Bf16::put(to, k, from[k]);
}
// One lane's share of an mma: left (32 lanes, 4 words), right (32 lanes, 2 words), c (4,).
SHIM_API void shim_mma_lane(int precision, int lane, const uint32_t* left, const uint32_t* right, float* c) {
  using namespace kruify::cuda;
  Words words;
  std::memcpy(words.left, left, sizeof words.left), std::memcpy(words.right, right, sizeof words.right);
  float sum[4];
  std::copy_n(c, 4, sum);
  if (precision == kruify::kTf32) lane_of_mma(Tf32{}, lane, sum, words);
  else lane_of_mma(Bf16{}, lane, sum, words);
  std::copy_n(sum, 4, c);
}

// What the operators ask of torch, where a CPU tensor stands for one on the GPU. The library binds these names to
// itself.
extern "C" int32_t aoti_torch_device_type_cpu();
extern "C" int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
extern "C" int32_t aoti_torch_get_device_index(void*, int32_t* number) {
  *number = device;
  return 0;
}
extern "C" int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = &chips;
  return 0;
}
extern "C" int32_t aoti_torch_delete_device_guard(void*) { return 0; }
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
// Allocated in pages of its own, filled with NaN, and ending at one that nobody may touch.
extern "C" int32_t aoti_torch_dtype_float64();
extern "C" int32_t torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
    int64_t offset, int32_t dtype, int32_t kind, int32_t number, void** tensor, int32_t layout, const uint8_t* metadata,
    int64_t length, void (*deleter)(void*, void*), void* context);
extern "C" int32_t aoti_torch_create_tensor_from_blob(void* data, int64_t dims, const int64_t* sizes,
    const int64_t* strides, int64_t offset, int32_t dtype, int32_t kind, int32_t, void** tensor) {
  return torch_from_blob(
      data, dims, sizes, strides, offset, dtype, kind, -1, tensor, 0, nullptr, 0, [](void*, void*) {}, nullptr);
}
extern "C" int32_t aoti_torch_empty_strided(
    int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t kind, int32_t, void** tensor) {
  size_t bytes = dtype == aoti_torch_dtype_float64() ? 8 : 4;
  for (int64_t d = 0; d < dims; ++d) bytes *= sizes[d];
  bytes = (bytes + 15) / 16 * 16;
  char* end;
  auto* pages = new Pages(bytes, &end);
  std::memset(end - bytes, 0xff, bytes);
  return torch_from_blob(
      end - bytes, dims, sizes, strides, 0, dtype, kind, -1, tensor, 0, nullptr, 0,
      [](void*, void* held) { delete static_cast<Pages*>(held); }, pages);
}
