// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx2
#define MVIT_VECTOR_BYTES 32
#include "linear_residual_kernel.h"
