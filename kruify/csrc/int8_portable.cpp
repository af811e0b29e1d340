#define KRUIFY_ISA int8_portable
#include "int8_kernels.h"
