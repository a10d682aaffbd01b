// SPDX-License-Identifier: Apache-2.0
#include "transformer_launch.h"

template mvit::TransformerLaunch* mvit::find_transformer<80>(int64_t head_dim, int64_t tiles, bool half);
