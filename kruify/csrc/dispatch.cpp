// Which instruction set serves, decided once at run time. KRUIFY_ISA=portable|avx2|avx512 overrides it downwards.
#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include "kernels.h"

namespace kruify {

#define KRUIFY_DECLARE(isa)                \
  namespace isa {                          \
  const Kernels<float>& float_kernels();   \
  const Kernels<double>& double_kernels(); \
  }
KRUIFY_DECLARE(portable)
#if defined(__x86_64__)
KRUIFY_DECLARE(avx2)
KRUIFY_DECLARE(avx512)
#endif

InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet best = InstructionSet::kPortable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = InstructionSet::kAvx2;
    if (best == InstructionSet::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      best = InstructionSet::kAvx512;
#endif
    const char* wish = std::getenv("KRUIFY_ISA");
    if (wish && !std::strcmp(wish, "portable")) return InstructionSet::kPortable;
    if (wish && !std::strcmp(wish, "avx2") && best == InstructionSet::kAvx512) return InstructionSet::kAvx2;
    return best;
  }();
  return chosen;
}

template <> const Kernels<float>& kernels<float>() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return avx512::float_kernels();
  if (instruction_set() == InstructionSet::kAvx2) return avx2::float_kernels();
#endif
  return portable::float_kernels();
}

template <> const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return avx512::double_kernels();
  if (instruction_set() == InstructionSet::kAvx2) return avx2::double_kernels();
#endif
  return portable::double_kernels();
}

int64_t instruction_set_op() { return static_cast<int64_t>(instruction_set()); }

}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&kruify::instruction_set_op));
}
