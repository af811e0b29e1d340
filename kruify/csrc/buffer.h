// Scratch memory and threads of the CPU's operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace kruify {

// Uninitialised memory, aligned for the widest vectors, with slack for tiles. A thread's last buffer is kept for the
// next call: fresh pages would cost more than the work of a single step.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && count < (int64_t(1) << 46), "kruify: a buffer of ", count, " elements");
    bytes_ = (count * sizeof(T) + 64 + 63) / 64 * 64;
    for (auto& kept : cache().slots)
      if (kept.bytes >= bytes_ && kept.bytes <= 4 * bytes_ + 4096) {
        data_ = kept.data, bytes_ = kept.bytes;
        kept = {nullptr, 0};
        return;
      }
    data_ = std::aligned_alloc(64, bytes_);
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() {
    Slot mine{data_, bytes_};
    if (bytes_ <= kKeep)
      for (auto& kept : cache().slots)
        if (!kept.data) {
          kept = mine;
          return;
        }
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(data_); }

 private:
  static constexpr size_t kKeep = size_t(4) << 20;
  struct Slot {
    void* data;
    size_t bytes;
  };
  struct Cache {
    Slot slots[6] = {};
    ~Cache() {
      for (auto& s : slots) std::free(s.data);
    }
  };
  static Cache& cache() {
    static thread_local Cache instance;
    return instance;
  }
  void* data_;
  size_t bytes_;
};

// Calls f(i) for i in [0, count) on torch's threads.
template <class F> void parallel(int64_t count, const F& f) {
  if (count == 1) return f(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace kruify
