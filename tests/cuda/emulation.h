// What the GPU's own instructions do, on a CPU: cp.async and mma.sync of one emulated thread.
#pragma once

#include "cuda/mma.h"

namespace kruify::cuda {

// Copies of one emulated thread that are on their way: they arrive as late as they may, when the thread waits.
struct Copies {
  static constexpr int kMost = 256;
  float* to[kMost];
  const float* from[kMost];
  int first = 0, last = 0;                      // of those on their way; places in the arrays modulo kMost
  int ends[kMost], committed = 0, arrived = 0;  // where each group ends; groups
};
inline thread_local Copies* copies = nullptr;  // of the thread that runs; null: they arrive at once

inline void emulate_fetch(float* shared, const float* global) {
  for (int i = 0; i < 4; ++i) shared[i] = copies ? NAN : global[i];
  if (!copies) return;
  if (copies->last - copies->first == Copies::kMost) throw std::runtime_error("too many copies on their way");
  copies->to[copies->last % Copies::kMost] = shared, copies->from[copies->last++ % Copies::kMost] = global;
}

inline void emulate_commit() {
  if (copies) copies->ends[copies->committed++ % Copies::kMost] = copies->last;
}

inline void emulate_wait(int pending) {
  if (!copies) return;
  for (; copies->committed - copies->arrived > pending; ++copies->arrived)
    for (const int end = copies->ends[copies->arrived % Copies::kMost]; copies->first < end; ++copies->first) {
      const int k = copies->first % Copies::kMost;
      for (int i = 0; i < 4; ++i) copies->to[k][i] = copies->from[k][i];
    }
}

// The numbers of a word, low half first; what TF32 ignores is gone.
inline void numbers_of(Tf32, uint32_t word, float (&to)[2]) { to[0] = float_of(word & 0xffffe000u), to[1] = 0.0f; }
inline void numbers_of(Bf16, uint32_t word, float (&to)[2]) {
  to[0] = float_of(word << 16), to[1] = float_of(word & 0xffff0000u);
}

// How often this CPU thread has emulated an mma: every lane of a warp has to meet each one.
inline thread_local int64_t emulated = 0;

// What one lane gets of an mma, from the words that all 32 lanes bring.
template <class Format> void emulate_mma(Format format, int lane, float (&c)[4], const Left* left, const Right* right) {
  ++emulated;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int w = 0; w < 8; ++w) {
      float a[2], b[2];
      numbers_of(format, left[row % 8 * 4 + w % 4].word[row / 8 + w / 4 * 2], a);
      numbers_of(format, right[column * 4 + w % 4].word[w / 4], b);
      c[i] += a[0] * b[0] + a[1] * b[1];
    }
  }
}

template <class Format, int NT>
void emulate_warp_tile(
    int lane, const float* a, int a_step, const float* b, int b_step, int words, float (&sum)[NT][4]) {
  for (int k = 0; k < words; k += 8) {
    Left left[32];
    Right right[32];
    for (int l = 0; l < 32; ++l) left[l] = take_left(l, a + k, a_step);
    for (int j = 0; j < NT; ++j) {
      for (int l = 0; l < 32; ++l) right[l] = take_right(l, b + j * 8 * b_step + k, b_step);
      emulate_mma(Format{}, lane, sum[j], left, right);
    }
  }
}

}  // namespace kruify::cuda
