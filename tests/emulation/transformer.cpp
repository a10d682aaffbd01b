// SPDX-License-Identifier: Apache-2.0
// Every kernel of `transformer`.
#define INSTANCES                                                                                                       \
  INSTANCE(64, 16, 1), INSTANCE(80, 20, 1), INSTANCE(96, 24, 1), INSTANCE(120, 30, 1), INSTANCE(144, 36, 1),            \
      INSTANCE(192, 48, 1), INSTANCE(240, 60, 1), INSTANCE(64, 16, 2), INSTANCE(80, 20, 2), INSTANCE(96, 24, 2),        \
      INSTANCE(120, 30, 2), INSTANCE(144, 36, 2), INSTANCE(192, 48, 2), INSTANCE(64, 8, 2), INSTANCE(80, 8, 2),         \
      INSTANCE(96, 8, 2), INSTANCE(120, 8, 2), INSTANCE(144, 8, 2), INSTANCE(192, 8, 2), INSTANCE(240, 8, 1)
#include "emulation/transformer_driver.h"
