// Takes float32 frames from standard input through a traced layer to standard output, with torch's C++ library and
// kruify's kernels: no Python. layer.ts and operators.h were written by trace.py.
#include <ATen/core/grad_mode.h>
#include <dlfcn.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "operators.h"

TORCH_LIBRARY_FRAGMENT(kruify, library) {
  for (const char* schema : OPERATORS) library.def(schema);
}

int main(int count, char** arguments) {
  if (count != 4) return std::fprintf(stderr, "stream_torch KERNELS LAYER FEATURES\n"), 2;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  at::NoGradGuard guard;
  torch::jit::Module layer = torch::jit::load(arguments[2]);
  const int64_t features = std::atoll(arguments[3]);
  std::vector<float> frames, frame(features);
  while (std::fread(frame.data(), sizeof(float), features, stdin) == frame.size())
    frames.insert(frames.end(), frame.begin(), frame.end());
  const int64_t steps = static_cast<int64_t>(frames.size()) / features;
  const at::Tensor input = at::from_blob(frames.data(), {steps, 1, features});
  const at::Tensor output = layer.forward({input}).toTuple()->elements()[0].toTensor().contiguous();
  std::fwrite(output.data_ptr<float>(), sizeof(float), output.numel(), stdout);
  return 0;
}
