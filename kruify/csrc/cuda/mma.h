// Products on tensor cores: a warp's tile of C[m][n] += sum_k A[m][k] B[n][k], operands rounded to TF32 or bf16, sums
// in float32. Both operands are rows in shared memory; a row is counted in words of 4 bytes: one TF32 number, or two of
// bf16.
//
// mma.sync.m16n8k8 (TF32) and m16n8k16 (bf16) take the same words: 16 rows of A and 8 rows of B, 8 words each, of which
// lane l holds words l % 4 and l % 4 + 4 of row l / 4 (and of A's row l / 4 + 8); C's row l / 4 (and + 8), columns
// 2 (l % 4) and the next (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "... m16n8k16"). A sum over k has no order:
// a lane loads words 2 (l % 4) and 2 (l % 4) + 1 of both operands instead, 8 bytes at once.
#pragma once

#include <cstring>

#include "../matrix.h"
#include "tile.h"

#if !defined(__CUDACC__)
void __syncwarp();  // tests/cuda/shim
#endif

namespace kruify::cuda {

// Words between the starts of rows of n numbers in shared memory. For tensor cores an odd multiple of 32 bytes: the
// lanes that load at one time then meet no bank twice.
constexpr KRUIFY_HD int row_words(Precision precision, int n) {
  if (precision == kFloat32) return n + kPad;
  const int words = precision == kTf32 ? n : n / 2;
  return words + (words / 8 % 2 ? 0 : 8);
}

KRUIFY_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}
KRUIFY_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// How the templates keep operands in shared memory. `put` writes number k of a row, or numbers k and k + 1, k even.
template <int Columns> struct Exact {  // float32, by threads' tiles of `Columns` columns
  static constexpr Precision precision = kFloat32;
  static constexpr int tile = Columns;
  static KRUIFY_HD void put(float* row, int k, float value) { row[k] = value; }
};

struct Tf32 {
  static constexpr Precision precision = kTf32;
  static constexpr int numbers = 1;  // per word
  // Nearest, ties away from zero.
  static KRUIFY_HD uint32_t round(float x) {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#else
    return x == x ? (bits_of(x) + 0x1000u) & 0xffffe000u : 0x7fffe000u;
#endif
  }
  static KRUIFY_HD void put(float* row, int k, float value) { row[k] = float_of(round(value)); }
  static KRUIFY_HD void put(float* row, int k, float first, float second) {
    put(row, k, first);
    put(row, k + 1, second);
  }
};

struct Bf16 {
  static constexpr Precision precision = kBf16;
  static constexpr int numbers = 2;
  // Nearest, ties to even.
  static KRUIFY_HD uint16_t round(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu);
#endif
  }
  static KRUIFY_HD void put(float* row, int k, float value) { reinterpret_cast<uint16_t*>(row)[k] = round(value); }
  static KRUIFY_HD void put(float* row, int k, float first, float second) {
    row[k / 2] = float_of(round(first) | static_cast<uint32_t>(round(second)) << 16);
  }
};

struct Left {
  uint32_t word[4];  // of A
};
struct Right {
  uint32_t word[2];  // of B
};

KRUIFY_HD Right load_words(const float* p) {
#if defined(__CUDA_ARCH__)
  const uint2 words = *reinterpret_cast<const uint2*>(p);
  return {{words.x, words.y}};
#else
  demand_aligned(p, 8);
  return {{bits_of(p[0]), bits_of(p[1])}};
#endif
}
KRUIFY_HD Left take_left(int lane, const float* a, int step) {
  const float* p = a + lane / 4 * step + lane % 4 * 2;
  const Right low = load_words(p), high = load_words(p + 8 * step);
  return {{low.word[0], high.word[0], low.word[1], high.word[1]}};
}
KRUIFY_HD Right take_right(int lane, const float* b, int step) {
  return load_words(b + lane / 4 * step + lane % 4 * 2);
}

#if defined(__CUDACC__)
__device__ __forceinline__ void mma(Tf32, float (&c)[4], const Left& a, const Right& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
}
__device__ __forceinline__ void mma(Bf16, float (&c)[4], const Left& a, const Right& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
}
#else  // tests/cuda/shim
void mma(Tf32, float (&c)[4], const Left& a, const Right& b);
void mma(Bf16, float (&c)[4], const Left& a, const Right& b);
#endif

// 16 x 8 NT of C, from the first rows of the tile in A and B on; rows lie `a_step` and `b_step` words apart.
template <class Format, int NT>
KRUIFY_HD void warp_tile(
    int lane, const float* a, int a_step, const float* b, int b_step, int words, float (&sum)[NT][4]) {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
  __syncwarp();  // mma.sync wants the whole warp, wherever its lanes come from
  KRUIFY_UNROLL_BY(4)
  for (int k = 0; k < words; k += 8) {
    const Left left = take_left(lane, a + k, a_step);
    KRUIFY_UNROLL
    for (int j = 0; j < NT; ++j) mma(Format{}, sum[j], left, take_right(lane, b + j * 8 * b_step + k, b_step));
  }
#endif
}

template <int NT, class Product, class Store, class Start>
KRUIFY_HD void share_tiles_of(
    const Thread& t, int count, int rows, int columns, const Product& product, const Store& store, const Start& start) {
  const int lane = t.id % 32, down = rows / 16, across = columns / (8 * NT);
  for (int e = t.id / 32; e < count * down * across; e += t.count / 32) {
    const int column = e % across * (8 * NT), row = e / across % down * 16, number = e / (across * down);
    float sum[NT][4];
    KRUIFY_UNROLL
    for (int j = 0; j < NT; ++j) {
      KRUIFY_UNROLL
      for (int i = 0; i < 4; ++i)
        sum[j][i] = start(number, row + lane / 4 + i / 2 * 8, column + 8 * j + lane % 4 * 2 + i % 2);
    }
    product(number, row, column, lane, sum);
    KRUIFY_UNROLL
    for (int j = 0; j < NT; ++j) {
      KRUIFY_UNROLL
      for (int half = 0; half < 2; ++half)
        store(number, row + lane / 4 + 8 * half, column + 8 * j + lane % 4 * 2, sum[j][2 * half], sum[j][2 * half + 1]);
    }
  }
}

// `count` products C (rows, columns), rows and columns multiples of 16, shared out to the block's warps as tiles:
// product(number, row, column, lane, sum) fills one, store(number, row, column, first, second) takes its elements in
// pairs, start(number, row, column) is what an element's sum starts from.
template <class Product, class Store, class Start>
KRUIFY_HD void share_tiles(
    const Thread& t, int count, int rows, int columns, const Product& product, const Store& store, const Start& start) {
  // Wider tiles load less for each product, while there is one for every warp.
  if (columns % 32 == 0 && count * (rows / 16) * (columns / 32) >= t.count / 32)
    share_tiles_of<4>(t, count, rows, columns, product, store, start);
  else share_tiles_of<2>(t, count, rows, columns, product, store, start);
}

struct Zero {
  KRUIFY_HD float operator()(int, int, int) const { return 0.0f; }
};

// `count` products C (rows, columns) = sum of A B^T, shared out to the block: tiles of 4 x Numbers::tile to its
// threads, or of 16 x 16 and 16 x 32 to its warps. The operands' rows of `depth` numbers lie in shared memory.
//   operands(number, add)               calls add(A, B) for all that is summed up
//   store(number, row, column, v...)    takes an element, on tensor cores two neighbours in a row
//   start(number, row, column)          what an element's sum starts from
// `Turned`: in float32 the four of a tile run along the columns. `shift`: the logarithm of the size that Numbers::tile
// divides, where the shapes are fixed and it is not known when the kernel is compiled.
template <class Numbers, class Shape, bool Turned = false, class Operands, class Store, class Start = Zero>
KRUIFY_HD void products(const Thread& t, int count, int rows, int columns, int depth, const Operands& operands,
    const Store& store, int shift = 0, const Start& start = {}) {
  const int width = row_words(Numbers::precision, depth);
  if constexpr (Numbers::precision == kFloat32) {
    constexpr int NT = Numbers::tile;
    const int down = (Turned ? columns : rows) / kTileRows, across = (Turned ? rows : columns) / NT;
    for (int e = t.id; e < count * down * across; e += t.count) {
      const Split place = shift ? split<Shape>(e, across, shift - (NT == 4 ? 2 : 1)) : Split{e / across, e % across};
      const int column = place.remainder, row = place.quotient % down, number = place.quotient / down;
      float sum[kTileRows][NT];
      KRUIFY_UNROLL
      for (int j = 0; j < NT; ++j) {
        KRUIFY_UNROLL
        for (int i = 0; i < kTileRows; ++i) {
          const int high = row + i * down, wide = column + j * across;
          sum[i][j] = start(number, Turned ? wide : high, Turned ? high : wide);
        }
      }
      operands(number, [&](const float* a, const float* b) {
        const float *left = Turned ? b : a, *right = Turned ? a : b;
        tile_fma<NT, Shape::turns>(
            left + row * width, down * width, right + column * width, across * width, depth, sum);
      });
      KRUIFY_UNROLL
      for (int j = 0; j < NT; ++j) {
        KRUIFY_UNROLL
        for (int i = 0; i < kTileRows; ++i) {
          const int high = row + i * down, wide = column + j * across;
          store(number, Turned ? wide : high, Turned ? high : wide, sum[i][j]);
        }
      }
    }
  } else {
    share_tiles(
        t, count, rows, columns,
        [&](int number, int row, int column, int lane, auto& sum) {
          operands(number, [&](const float* a, const float* b) {
            warp_tile<Numbers>(lane, a + row * width, width, b + column * width, width, depth / Numbers::numbers, sum);
          });
        },
        store, start);
  }
}

// to[0], to[1] ... = the values, or what was there and the values.
template <class... Values> KRUIFY_HD void write_values(float* to, bool accumulate, Values... values) {
  ((*to = accumulate ? *to + values : values, ++to), ...);
}

}  // namespace kruify::cuda
