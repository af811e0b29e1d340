#define KRUIFY_ISA int8_avx2
#include "int8_kernels.h"
