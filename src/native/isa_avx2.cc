// The kernels for AVX2 with FMA.
#define UNROLLED_ISA avx2
#define UNROLLED_TABLE kernels_avx2
#define UNROLLED_LANES 8
#define UNROLLED_BF16 0
#include "instruction_set.h"
