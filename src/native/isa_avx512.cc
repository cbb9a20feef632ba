// The kernels for AVX-512 (F, BW, DQ, VL).
#define UNROLLED_ISA avx512
#define UNROLLED_TABLE kernels_avx512
#define UNROLLED_LANES 16
#define UNROLLED_BF16 0
#include "instruction_set.h"
