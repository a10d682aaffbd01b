// SPDX-License-Identifier: Apache-2.0
#define MVIT_ISA portable
#define MVIT_VECTOR_BYTES 16
#include "linear_residual_kernel.h"
