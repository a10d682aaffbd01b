// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx512
#define MVIT_VECTOR_BYTES 64
#include "linear_residual_kernel.h"
