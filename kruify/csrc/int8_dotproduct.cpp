#define KRUIFY_ISA int8_dotproduct
#include "int8_kernels.h"
