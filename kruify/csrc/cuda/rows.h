// Rows of a packed batch: where step t of sample b lies, and how long b is.
#pragma once

#include "host_device.h"

namespace kruify::cuda {

struct Rows {
  const int* starts;  // (steps + 1,) first row of each step, or null where every step has the whole batch
  int steps, batch;
  bool reverse;

  // Number of steps of sample b: batch sizes descend, so the steps that hold b are the first ones.
  KRUIFY_HD int length(int b) const {
    if (!starts) return b < batch ? steps : 0;
    int low = 0, high = steps;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (starts[middle + 1] - starts[middle] > b) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  // The row of the n-th step that sample b takes, in the order of the recurrence.
  KRUIFY_HD int64_t row(int n, int b, int length) const {
    const int t = reverse ? length - 1 - n : n;
    return (starts ? starts[t] : static_cast<int64_t>(t) * batch) + b;
  }
};

}  // namespace kruify::cuda
