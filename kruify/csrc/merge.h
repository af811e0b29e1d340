// Tiny factors multiplied into stages of a good size.
#pragma once

#include "checks.h"

namespace kruify {

// Consecutive factors, each (gates, rank, P, Q) or all (P, Q), to one stage (gates, rank, P, Q) a group.
std::vector<Tensor> merge(const std::vector<Tensor>& factors, const Optional& scale, const std::vector<int64_t>& groups);
std::vector<Tensor> merge_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& factors, const Optional& scale,
                                   const std::vector<int64_t>& groups);

}  // namespace kruify
