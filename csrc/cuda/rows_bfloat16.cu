// SPDX-License-Identifier: Apache-2.0
#include "row_launch.h"

template int mvit::launch_row_product<false>(const RowProduct& args, const RowProductPlan& plan, CUstream_st* stream);
template int mvit::launch_layer_norm_mlp<false>(const RowMlp& args, CUstream_st* stream);
