#define KRUIFY_ISA int8_avxvnni
#include "int8_kernels.h"
