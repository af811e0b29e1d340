// The machine that products.h and schedule.h run on: one GPU, the current stream of torch, memory from torch's caching
// allocator.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>

#include "../arguments.h"
#include "launch.cuh"
#include "launches.h"

// A library built with CUDA loads beside a torch without it; its CUDA operators are then never reached. One that was
// built beside such a torch finds the function by name when it runs beside one with CUDA.
#pragma weak aoti_torch_get_current_cuda_stream

namespace kruify::cuda {

template <class Item> __global__ void __launch_bounds__(256) items_kernel(const __grid_constant__ Item item) {
  const int64_t count = item.items();
  for (int64_t k = blockIdx.x * int64_t{256} + threadIdx.x; k < count; k += gridDim.x * int64_t{256}) item.run(k);
}

inline decltype(&aoti_torch_get_current_cuda_stream) current_stream() {
  static const auto found = [] {
    if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream;
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(symbol);
  }();
  if (!found) throw std::runtime_error("kruify: this torch has no CUDA, but its tensors are on a GPU: reinstall torch");
  return found;
}

// How many clusters of so many blocks run at one time, each block on a multiprocessor of its own.
inline int clusters_at_once(const Chip& chip, int cluster) {
  if (cluster == 1) return chip.processors;
  const auto kernel = items_kernel<Upload>;
  allow_shared_memory(kernel, "asking for clusters");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster), config.blockDim = dim3(512), config.dynamicSmemBytes = chip.shared_memory;
  config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "asking for clusters");
  return count;
}

// The current GPU, which is number `device`. No room at all where this library holds no code for it.
inline Chip chip_of(int device) {
  static std::mutex mutex;
  static std::vector<Chip> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(known.size()) <= device) known.resize(device + 1, Chip{});
  Chip& chip = known[device];
  if (!chip.processors) {
    int major = 0;
    cudaFuncAttributes code{};
    const cudaError_t found = cudaFuncGetAttributes(&code, items_kernel<Upload>);
    const bool runs = found != cudaErrorNoKernelImageForDevice && found != cudaErrorInvalidDeviceFunction;
    if (runs) check(found, "asking for the kernels");
    else cudaGetLastError();
    check(cudaDeviceGetAttribute(&chip.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking the GPU for its size");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the GPU for its size");
    check(cudaDeviceGetAttribute(&chip.processors, cudaDevAttrMultiProcessorCount, device),
        "asking the GPU for its size");
    // Code that the driver translated from the PTX of an older chip knows nothing of clusters.
    chip.clusters = major >= 9 && code.ptxVersion >= 90;
    if (!runs) chip.shared_memory = 0, chip.clusters = false;
    for (int k = 0; k < 4; ++k) chip.at_once[k] = k && !chip.clusters ? 0 : clusters_at_once(chip, 1 << k);
  }
  return chip;
}

class Machine {
 public:
  Chip chip;
  Optional residual_index;  // of the matrix at hand, where it has a sparse residual

  explicit Machine(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    const int device = like.get_device_index();
    // The guard sets the device of torch's CUDA runtime; this library carries one of its own.
    check(cudaSetDevice(device), "choosing the GPU");
    chip = chip_of(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class T> T* scratch(int64_t n) {
    const int64_t of_like = like_.scalar_type() == ScalarType::Double ? 8 : 4;
    kept_.push_back(empty(like_, {(n * static_cast<int64_t>(sizeof(T)) + of_like - 1) / of_like}));
    return reinterpret_cast<T*>(kept_.back().mutable_data_ptr());
  }
  template <class F> void scoped(const F& f) {
    const size_t before = kept_.size();
    f();
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(before), kept_.end());  // in the stream's order
  }
  const int* upload(const std::vector<int>& values) {
    int* to = scratch<int>(values.size());
    for (size_t first = 0; first < values.size(); first += Upload::kMost) {
      Upload item{};
      item.count = static_cast<int>(std::min<size_t>(Upload::kMost, values.size() - first)), item.to = to + first;
      std::copy_n(values.begin() + first, item.count, item.values);
      run(item);
    }
    return to;
  }
  template <class Item> void run(const Item& item) {
    static_assert(sizeof(Item) <= 4096, "a launch takes 4 KB of parameters");
    const int64_t count = item.items();
    if (count)
      launch(items_kernel<Item>, dim3(static_cast<unsigned>(least((count + 255) / 256, 1 << 20))), 256, 0, 1, stream_,
          "a launch over rows", item);
  }
  template <class T> void sort_columns(SparseResidual<T>& s) {
    const Tensor column = torch::stable::contiguous(torch::stable::select(*residual_index, 1, 1));
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(column), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    kept_.push_back(torch::stable::detail::to<Tensor>(stack[0]));
    s.by_column = data<int>(kept_.back());
    kept_.push_back(torch::stable::detail::to<Tensor>(stack[1]));
    s.blocks_by_column = data<int64_t>(kept_.back());
  }

  template <class T> void multiply(const Dense<T>& out, const Dense<const T>& a, const Dense<const T>& b) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(view(a)), from(view(b)), from(view(out))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

  template <class Arguments> void pair_recurrence(AnyShape s, const PairPlan& p, const Arguments& args) {
    launch_pair(s, p, args, stream_);
  }
  template <class Arguments> void low_rank_recurrence(const LowRankPlan& p, const Arguments& args) {
    launch_low_rank(p, args, stream_);
  }
  void pair_product(AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward) {
    const int64_t turns = (args.rows + p.batch - 1) / p.batch, resident = greatest(1, chip.shared_memory / p.bytes);
    launch_pair_product(
        s, p, args, backward, static_cast<int>(least(turns, least(4, resident) * chip.processors)), stream_);
  }
  void pair_gradient(AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank) {
    launch_pair_gradient(s, p, args, pieces, rank, stream_);
  }
  template <class T, class Arrays> void general_recurrence(const Program<T>& m, const Arrays& args) {
    const int64_t elements = general_scratch(m), bytes = elements * static_cast<int64_t>(sizeof(T));
    const bool fits = bytes <= chip.shared_memory;
    T* memory = fits ? nullptr : scratch<T>(elements * args.rows.batch);
    launch_general(m, args, memory, fits ? static_cast<int>(bytes) : 0, stream_);
  }

 private:
  template <class T> Tensor view(const Dense<T>& m) const {
    const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row, m.col};
    int32_t dtype, device;
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like_.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like_.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<std::remove_const_t<T>*>(m.data), 2, sizes,
        strides, 0, dtype, device, like_.get_device_index(), &result));
    return Tensor(result);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

}  // namespace kruify::cuda
