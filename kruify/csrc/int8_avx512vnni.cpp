#define KRUIFY_ISA int8_avx512vnni
#include "int8_kernels.h"
