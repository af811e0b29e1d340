// The eight-bit kernels on top of another dot product, bit by bit against the portable ones, where the hardware for it
// is missing:
//
//     g++ -std=c++20 -O2 -ffp-contract=off -Ikruify/csrc tests/ops/int8_emulated.cpp kruify/csrc/int8_portable.cpp
//
// with -mavx2 -DEMULATE=256: AVX-VNNI's instruction is a function below; with -mavx2 -mfma -DEMULATE=512: AVX-512 by
// SIMDe (Debian's libsimde-dev); on ARM, or under qemu, with -march=armv8.2-a+dotprod.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define KRUIFY_ISA int8_emulated
#if EMULATE == 256
#include <immintrin.h>
// Intel's definition: four products of unsigned with signed bytes, added to 32 bits, nothing saturates.
static inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
  int32_t sums[8];
  uint8_t first[32];
  int8_t second[32];
  memcpy(sums, &sum, 32), memcpy(first, &a, 32), memcpy(second, &b, 32);
  for (int i = 0; i < 32; ++i) sums[i / 4] += int32_t(first[i]) * int32_t(second[i]);
  memcpy(&sum, sums, 32);
  return sum;
}
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 dpbusd
#elif EMULATE == 512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// What SIMDe 0.7.4 lacks.
static inline __m512 load_lanes(uint32_t mask, const float* p) {
  float v[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) v[i] = p[i];
  return simde_mm512_loadu_ps(v);
}
static inline void store_lanes(float* p, uint32_t mask, __m512 v) {
  float all[16];
  simde_mm512_storeu_ps(all, v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = all[i];
}
static inline __m128i low_bytes(__m512i v) {
  int32_t all[16];
  int8_t low[16];
  memcpy(all, &v, sizeof all);
  for (int i = 0; i < 16; ++i) low[i] = int8_t(all[i]);
  return simde_mm_loadu_si128(low);
}
#define _mm512_cvtepi32_epi8 low_bytes
#define _mm512_maskz_loadu_ps load_lanes
#define _mm512_mask_storeu_ps store_lanes
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
#endif
#include "int8_kernels.h"

namespace kruify::int8_portable {
const Int8Kernels& int8_kernels();
}

using namespace kruify;

struct Packed {
  std::vector<float> scale;
  std::vector<int32_t> start;
  std::vector<int8_t> weights;
};

static Int8Panels pack(
    const Int8Kernels& kernels, int64_t rows, int64_t cols, const std::vector<int8_t>& w, Packed& to) {
  const int64_t lanes = kernels.lanes, padded = round_up(rows, lanes), groups = (cols + 3) / 4;
  to.scale.assign(padded, 0), to.start.assign(padded, 0), to.weights.assign(padded * groups * 4, 0);
  for (int64_t r = 0; r < rows; ++r) {
    to.scale[r] = 0.01f + 0.001f * float(r % 7);
    for (int64_t k = 0; k < cols; ++k) {
      to.weights[r / lanes * lanes * groups * 4 + k / 4 * lanes * 4 + r % lanes * 4 + k % 4] = w[r * cols + k];
      to.start[r] -= kernels.shift * w[r * cols + k];
    }
  }
  return {rows, groups, 0, to.scale.data(), to.start.data(), to.weights.data()};
}

static std::vector<float> product(const Int8Kernels& kernels, int64_t rows, int64_t cols, int64_t rank, int64_t count,
    const std::vector<int8_t>& u, const std::vector<int8_t>& v, const std::vector<float>& x) {
  Packed memory[2];
  Int8Matrix m{};
  m.gates = 1, m.rows = rows, m.cols = cols, m.rank = rank;
  if (rank) m.v = pack(kernels, rank, cols, v, memory[0]);
  m.u[0] = pack(kernels, rows, rank ? rank : cols, u, memory[1]);
  std::vector<float> y(count * rows, 1.0f), scratch(int8_scratch(m, count));
  float* to[] = {y.data()};
  kernels.multiply(m, count, x.data(), cols, nullptr, to, rows, scratch.data());
  return y;
}

int main() {
  const Int8Kernels &emulated = int8_emulated::int8_kernels(), &portable = int8_portable::int8_kernels();
  int cases = 0;
  for (int64_t rows : {1, 16, 31, 130})
    for (int64_t cols : {1, 30, 64, 257})
      for (int64_t rank : {0, 7, 32})
        for (int64_t count : {1, 2, 5, 8}) {
          std::vector<int8_t> u(rows * (rank ? rank : cols)), v(rank * cols);
          std::vector<float> x(count * cols);
          for (int8_t& w : u) w = int8_t(rand() % 3 ? rand() % 255 - 127 : 127 - 254 * (rand() % 2));
          for (int8_t& w : v) w = int8_t(rand() % 255 - 127);
          for (float& f : x) f = float(rand() % 2001 - 1000) / 1000;
          const auto a = product(emulated, rows, cols, rank, count, u, v, x);
          const auto b = product(portable, rows, cols, rank, count, u, v, x);
          if (memcmp(a.data(), b.data(), a.size() * sizeof(float))) {
            printf("rows %ld, cols %ld, rank %ld, count %ld differ\n", long(rows), long(cols), long(rank), long(count));
            return 1;
          }
          ++cases;
        }
  printf("%d cases, %ld lanes, shift %d\n", cases, long(emulated.lanes), int(emulated.shift));
}
