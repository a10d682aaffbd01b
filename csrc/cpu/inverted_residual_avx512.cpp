// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA avx512
#define MVIT_VECTOR_BYTES 64
#include "inverted_residual_kernel.h"
