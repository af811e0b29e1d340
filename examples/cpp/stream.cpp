// Streams float32 frames from standard input through a recurrent layer to standard output: no Python, no torch.
// layer.c was written by `kruify export small.kru.safetensors --to c -o layer.c`.
#include <cstdio>

#define LAYER_DECLARATIONS
#include "layer.c"

int main() {
  layer_state state;
  layer_init(&state);
  float frame[LAYER_INPUT];
  while (std::fread(frame, sizeof frame, 1, stdin) == 1)
    std::fwrite(layer_step(&state, frame), sizeof(float), LAYER_OUTPUT, stdout);
  return 0;
}
