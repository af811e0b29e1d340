// A packed matrix of eight-bit integers as the operators are given it: one tensor of bytes, and a layout
//
//     gates, rows, cols, rank, and of each gate the first and the number of the columns of U
//
// where rank is the number of rows of V, or 0 where there is none.
#pragma once

#include <vector>

#include "arguments.h"
#include "int8.h"
#include "linear.h"

namespace kruify {

class Int8Layout {
 public:
  Int8Matrix matrix{};  // without its memory
  int64_t bytes = 0;

  explicit Int8Layout(const std::vector<int64_t>& code) {
    LayoutReader read(code);
    Int8Matrix& m = matrix;
    m.gates = int(read.next(1, kMaxGates, "number of gates"));
    m.rows = read.next(1, kInt8Depth, "rows"), m.cols = read.next(1, kInt8Depth, "cols");
    m.rank = read.next(0, kInt8Depth, "rank");
    if (m.rank) add(m.v, m.rank, 0, m.cols);
    for (int g = 0; g < m.gates; ++g) {
      const int64_t first = read.next(0, m.depth() - 1, "first column");
      STD_TORCH_CHECK(first % 4 == 0, "kruify: a gate's columns begin at ", first, ", not at a multiple of four");
      columns_[g] = read.next(1, m.depth() - first, "number of columns");
      add(m.u[g], m.rows, first, columns_[g]);
    }
    STD_TORCH_CHECK(read.done(), "kruify: the layout goes on after its last gate");
  }

  int64_t columns(int gate) const { return columns_[gate]; }

  // The places of a packed matrix in its memory.
  Int8Matrix placed(int8_t* memory) const {
    Int8Matrix m = matrix;
    if (m.rank) place(m.v, memory);
    for (int g = 0; g < m.gates; ++g) place(m.u[g], memory);
    return m;
  }

 private:
  int64_t columns_[kMaxGates];

  static int64_t padded_rows(const Int8Panels& p) { return round_up(p.rows, int8_kernels().lanes); }
  void add(Int8Panels& p, int64_t rows, int64_t first, int64_t columns) {
    p.rows = rows, p.first = first, p.groups = (columns + 3) / 4;
    bytes += padded_rows(p) * (p.groups * 4 + 8);
  }
  static void place(Int8Panels& p, int8_t*& memory) {
    const int64_t rows = padded_rows(p);
    p.scale = reinterpret_cast<float*>(memory), p.start = reinterpret_cast<int32_t*>(p.scale + rows);
    p.weights = reinterpret_cast<int8_t*>(p.start + rows);
    memory = p.weights + rows * p.groups * 4;
  }
};

// The same, checked.
struct CheckedInt8 {
  Tensor memory;
  Int8Matrix matrix;

  CheckedInt8(const Tensor& packed, const std::vector<int64_t>& code) {
    const Int8Layout layout(code);
    memory = checked("the packed matrix", packed, {false, 0, ScalarType::Char}, layout.bytes);
    STD_TORCH_CHECK(
        reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % 16 == 0, "kruify: the packed matrix is not aligned");
    matrix = layout.placed(const_cast<int8_t*>(data<int8_t>(memory)));
  }

  static constexpr int64_t kRows = 48;  // of x that share what is read of the matrix

  // y (rows, stride ys) = constant + x (W + rest)^T, on all threads; constant (gates * rows,).
  void multiply(int64_t rows, const float* x, const float* constant, float* y, int64_t ys,
      const Matrix<float>* rest = nullptr) const {
    const Int8Matrix& m = matrix;
    const int64_t tiles = (rows + kRows - 1) / kRows;
    const int64_t workers = std::min(threads_for(rows * m.gates * m.rows * m.depth()), tiles);
    parallel(workers, [&](int64_t worker) {
      Buffer<float> scratch(std::max(int8_scratch(m, std::min(rows, kRows)), rest ? rest->scratch : 0));
      for (int64_t i = rows * worker / workers, end = rows * (worker + 1) / workers; i < end; i += kRows) {
        float* to[kMaxGates];
        for (int g = 0; g < m.gates; ++g) to[g] = y + i * ys + g * m.rows;
        const int64_t count = std::min(kRows, end - i);
        int8_kernels().multiply(m, count, x + i * m.cols, m.cols, constant, to, ys, scratch.data());
        if (rest) kernels<float>().product(*rest, count, x + i * m.cols, m.cols, to, ys, scratch.data());
      }
    });
  }
};

}  // namespace kruify
