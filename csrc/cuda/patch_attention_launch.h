// SPDX-License-Identifier: Apache-2.0
// Launches of patch_attention's kernels, for the files that compile them for one dtype each.
#pragma once

#include "launch.h"
#include "patch_attention_backward_kernel.h"
#include "patch_attention_backward_whole_kernel.h"
#include "patch_attention_kernel.h"

namespace mvit {

template <bool HALF>
int launch_patch_attention(const PatchAttentionForward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens)), plan.threads(),
                  patch_attention_shared_bytes(plan, D), stream, args, plan);
  });
}

template <bool HALF>
int launch_patch_attention_backward(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_backward_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands), plan.blocks_y(args.shape.tokens)), plan.threads(),
                  patch_attention_backward_shared_bytes(plan, D, args.shape.tokens), stream, args, plan);
  });
}

template <bool HALF>
int launch_patch_attention_backward_whole(const PatchAttentionBackward& args, int copy_bytes, CUstream_st* stream) {
  const PatchAttentionPlan plan = plan_patch_attention_backward_whole(args.shape, copy_bytes);
  return for_padded_head_dim(padded_head_dim(args.shape.head_dim), [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    return launch(patch_attention_backward_whole_kernel<std::conditional_t<HALF, Half, BFloat16>, D, tiles_of_warp(D)>,
                  dim3(plan.blocks_x(args.shape.strands)), plan.threads(),
                  patch_attention_backward_whole_shared_bytes(plan, D), stream, args, plan);
  });
}

}  // namespace mvit
