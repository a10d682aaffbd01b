// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx512
#define MVIT_VECTOR_BYTES 64
#include "layer_norm_mlp_kernel.h"
