// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx512bf16
#define MVIT_VECTOR_BYTES 64
#define MVIT_BF16_PAIRS 1
#include "layer_norm_linear_kernel.h"
