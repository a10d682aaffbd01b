// SPDX-License-Identifier: Apache-2.0
#include "patch_attention_launch.h"

template int mvit::launch_patch_attention<true>(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream);
