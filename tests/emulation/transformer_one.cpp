// SPDX-License-Identifier: Apache-2.0
// One kernel of `transformer`, for faults: each is a build of its own.
#define INSTANCES INSTANCE_BFLOAT16(80, 20, 2)
#include "emulation/transformer_driver.h"
