// The kernels for AVX-512 with bfloat16 dot products.
#define UNROLLED_ISA avx512bf16
#define UNROLLED_TABLE kernels_avx512bf16
#define UNROLLED_LANES 16
#define UNROLLED_BF16 1
#include "instruction_set.h"
