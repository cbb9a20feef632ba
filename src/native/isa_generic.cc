// The kernels for any processor: vectors of four floats (SSE2, NEON).
#define UNROLLED_ISA generic
#define UNROLLED_TABLE kernels_generic
#define UNROLLED_LANES 4
#define UNROLLED_BF16 0
#include "instruction_set.h"
