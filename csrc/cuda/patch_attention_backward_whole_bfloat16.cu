// SPDX-License-Identifier: Apache-2.0
#include "patch_attention_launch.h"

template int mvit::launch_patch_attention_backward_whole<false>(const PatchAttentionBackward& args, int copy_bytes,
                                                               CUstream_st* stream);
