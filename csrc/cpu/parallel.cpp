// SPDX-License-Identifier: Apache-2.0
// PyTorch's threads (see parallel.h).
#include "parallel.h"

#include "tensors.h"

namespace mvit {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_parts(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace mvit
