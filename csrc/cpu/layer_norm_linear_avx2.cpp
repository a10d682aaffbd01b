// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx2
#define MVIT_VECTOR_BYTES 32
#include "layer_norm_linear_kernel.h"
