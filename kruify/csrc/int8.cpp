// The operators `int8_pack` and `int8_linear`, and which instruction set serves products of eight-bit integers.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "int8_matrix.h"
#include "kernels.h"
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kruify {

#define KRUIFY_DECLARE(isa)          \
  namespace isa {                    \
  const Int8Kernels& int8_kernels(); \
  }
KRUIFY_DECLARE(int8_portable)
#if defined(__x86_64__)
KRUIFY_DECLARE(int8_avx2)
KRUIFY_DECLARE(int8_avxvnni)
KRUIFY_DECLARE(int8_avx512vnni)
#elif defined(__aarch64__)
KRUIFY_DECLARE(int8_dotproduct)
#endif

Int8InstructionSet int8_instruction_set() {
  static const Int8InstructionSet chosen = [] {
#if defined(__x86_64__)
    const InstructionSet floats = instruction_set();
    if (floats == InstructionSet::kPortable) return Int8InstructionSet::kPortable;
    if (floats == InstructionSet::kAvx512 && __builtin_cpu_supports("avx512vnni"))
      return Int8InstructionSet::kAvx512Vnni;
    if (!std::getenv("KRUIFY_ISA") && __builtin_cpu_supports("avxvnni")) return Int8InstructionSet::kAvxVnni;
    return Int8InstructionSet::kAvx2;
#elif defined(__aarch64__) && defined(__linux__)
    const char* wish = std::getenv("KRUIFY_ISA");
    const bool portable = wish && !std::strcmp(wish, "portable");
    if (!portable && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) return Int8InstructionSet::kDotProduct;
#endif
    return Int8InstructionSet::kPortable;
  }();
  return chosen;
}

const Int8Kernels& int8_kernels() {
  switch (int8_instruction_set()) {
#if defined(__x86_64__)
    case Int8InstructionSet::kAvx2: return int8_avx2::int8_kernels();
    case Int8InstructionSet::kAvxVnni: return int8_avxvnni::int8_kernels();
    case Int8InstructionSet::kAvx512Vnni: return int8_avx512vnni::int8_kernels();
#elif defined(__aarch64__)
    case Int8InstructionSet::kDotProduct: return int8_dotproduct::int8_kernels();
#endif
    default: return int8_portable::int8_kernels();
  }
}

namespace {

// Rounds w (rows, columns of it) to eight bits: a row's scale is its largest element / 127, NaN where an element is not
// finite, and 1 where all elements are such integers already.
void pack(const Int8Panels& p, int64_t columns, const float* w, int64_t ld) {
  const int64_t lanes = int8_kernels().lanes;
  for (int64_t row = 0; row < p.rows; ++row, w += ld) {
    float largest = 0, faults = 0;
    bool whole = true;
    for (int64_t k = 0; k < columns; ++k) {
      largest = std::max(largest, std::abs(w[k])), faults += 0 * w[k];
      whole &= w[k] == std::nearbyint(w[k]);
    }
    const float scale = whole && largest > 0 && largest <= 127 ? 1 : largest / 127;
    p.scale[row] = scale + faults;
    if (!(p.scale[row] > 0)) continue;  // also NaN
    int8_t* panel = p.weights + row / lanes * lanes * p.groups * 4 + row % lanes * 4;
    for (int64_t k = 0; k < columns; ++k) {
      const int8_t rounded = int8_t(std::clamp(std::nearbyint(w[k] / scale), -127.0f, 127.0f));
      panel[k / 4 * lanes * 4 + k % 4] = rounded;
      p.start[row] -= int8_kernels().shift * rounded;
    }
  }
}

const Place kFloats{false, 0, ScalarType::Float};

Tensor int8_pack(const Optional& first, const Tensor& second, const std::vector<int64_t>& code) {
  const Int8Layout layout(code);
  const Int8Matrix& m = layout.matrix;
  STD_TORCH_CHECK(first.has_value() == (m.rank > 0), "kruify::int8_pack: a rank needs two matrices, and two a rank");
  const Optional v = checked("the first matrix", first, kFloats, m.rank, m.cols);
  const Tensor u = checked("the second matrix", second, kFloats, m.gates * m.rows, -1);
  for (int g = 0; g < m.gates; ++g)
    STD_TORCH_CHECK(layout.columns(g) <= u.size(1), "kruify::int8_pack: gate ", g, " has ", layout.columns(g),
        " columns of ", u.size(1));
  Tensor packed = torch::stable::new_empty(u, {layout.bytes}, ScalarType::Char);
  int8_t* memory = writable<int8_t>(packed);
  std::memset(memory, 0, layout.bytes);
  const Int8Matrix to = layout.placed(memory);
  if (v) pack(to.v, m.cols, data<float>(*v), m.cols);
  for (int g = 0; g < m.gates; ++g)
    pack(to.u[g], layout.columns(g), data<float>(u) + g * m.rows * u.size(1), u.size(1));
  return packed;
}

Tensor int8_linear(const Tensor& x_given, const Tensor& packed, const std::vector<int64_t>& code) {
  const CheckedInt8 w(packed, code);
  const Int8Matrix& m = w.matrix;
  const Tensor x = checked("x", x_given, kFloats, -1, m.cols);
  const int64_t rows = x.size(0), width = m.gates * m.rows;
  Tensor out = empty(x, {rows, width});
  const std::vector<float> zero(width);
  if (rows) w.multiply(rows, data<float>(x), zero.data(), writable<float>(out), width);
  return out;
}

// Of where each tensor is and up to 64 of its elements, spread over it: tells whether a packed copy may have grown
// stale. Of one that is not float32 on the CPU no elements count: it is none that was packed.
int64_t fingerprint(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0;
  auto add = [&](uint64_t number) { hash = hash * 0x9e3779b97f4a7c15u + number + 1; };
  for (const Tensor& given : tensors) {
    const bool floats = kFloats.holds(given) && given.scalar_type() == ScalarType::Float;
    add(reinterpret_cast<uintptr_t>(given.const_data_ptr()) + floats);
    const Tensor t = as_contiguous(given);
    const uint32_t* bits = data<uint32_t>(t);
    const int64_t n = floats ? t.numel() : 0, step = std::max<int64_t>(1, n / 64);
    for (int64_t i = 0; i < n; i += step) add(bits[i]);
  }
  return int64_t(hash);
}

int64_t int8_instruction_set_op() { return static_cast<int64_t>(int8_instruction_set()); }

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CompositeExplicitAutograd, m) {
  m.impl("int8_instruction_set", TORCH_BOX(&kruify::int8_instruction_set_op));
}

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("int8_pack", TORCH_BOX(&kruify::int8_pack));
  m.impl("fingerprint", TORCH_BOX(&kruify::fingerprint));
  m.impl("int8_linear", TORCH_BOX(&kruify::int8_linear));
}
