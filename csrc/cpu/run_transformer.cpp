// SPDX-License-Identifier: Apache-2.0
// Memory and threads around transformer_kernel.cpp, for the operator transformer and for frozen networks.
#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "transformer.h"

namespace mvit {
namespace {

int64_t blocks_of(const TransformerKernels& kernels, const TransformerShape& shape, int64_t sequences) {
  return (kernels.unit_lanes(shape, sequences) + 31) / 32;
}

// A unit has enough whole sequences to fill two blocks, so that one pass over the weights serves 64 tokens (at N = 16
// the cost is streaming the weights from L3), or on matrix tiles, which multiply in less time than weights take to
// come, eight (at N = 64, 12 % of the time). Beyond that, the number that wastes the fewest lanes: 49 tokens are 56
// lanes or four vectors of 16, twice 49 are seven. The memory that a unit keeps between steps is limited to half of an
// L2: of 1 MB, or of the 2 MB of processors with tiles.
int64_t sequences_of_a_unit(const TransformerKernels& kernels, const TransformerShape& shape, int64_t most) {
  const std::size_t most_bytes = kernels.pack == nullptr ? 512 << 10 : 1 << 20;
  const auto lanes = [&](int64_t n) { return kernels.unit_lanes(shape, n); };
  const auto computed = [&](int64_t n) { return static_cast<double>((lanes(n) + 15) / 16 * 16) / static_cast<double>(n); };
  const int64_t wanted = kernels.lanes_of_a_unit;
  int64_t best = 1;
  for (int64_t n = 2; n <= most && kernels.unit_bytes(shape, n) <= most_bytes && lanes(n) <= 256; ++n)
    if ((lanes(best) < wanted && lanes(n) <= wanted) || computed(n) < computed(best)) best = n;
  return best;
}

double flops_of_a_block(const TransformerShape& shape) {
  const double products = static_cast<double>(shape.width * (4 * shape.inner() + 2 * shape.hidden));
  return 2.0 * 32 * (products + 2.0 * static_cast<double>(shape.inner() * shape.tokens()));
}

}  // namespace

void run_transformer(const TransformerKernels& kernels, const TransformerArgs& args, bool on_this_thread_alone) {
  const TransformerShape& shape = args.shape;
  const int64_t steps = kernels.steps(shape), sequences = shape.sequences();
  if (sequences == 0 || shape.tokens() == 0 || shape.width == 0) return;
  const std::size_t step_bytes = kernels.step_bytes(shape);
  const int64_t threads = on_this_thread_alone ? 1 : thread_count();
  const int64_t group = sequences_of_a_unit(kernels, shape, std::max<int64_t>(1, sequences / threads));
  const int64_t units = (sequences + group - 1) / group;
  const auto size_of = [&](int64_t unit) { return std::min(group, sequences - unit * group); };
  const std::size_t unit_bytes = (kernels.unit_bytes(shape, group) + 63) / 64 * 64;

  // Each thread takes whole units: no synchronisation.
  if (threads == 1 || units % threads == 0 || units >= 4 * threads) {
    const auto whole_units = [&](int64_t begin, int64_t end) {
      const Scratch scratch(unit_bytes + step_bytes);
      char* const memory = scratch.data();
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t blocks = blocks_of(kernels, shape, size_of(unit));
        for (int64_t step = 0; step < steps; ++step)
          for (int64_t block = 0; block < blocks; ++block)
            kernels.step(args, step, unit * group, size_of(unit), block, memory, memory + unit_bytes);
      }
    };
    if (on_this_thread_alone) return whole_units(0, units);
    return parallel_for(units, flops_of_a_block(shape) * static_cast<double>(blocks_of(kernels, shape, group)),
                        whole_units);
  }

  // More threads than units: all threads share the blocks of one step, then those of the next.
  const Scratch shared(unit_bytes * static_cast<std::size_t>(units), ScratchUse::shared);
  char* const memory = shared.data();
  const int64_t unit_blocks = blocks_of(kernels, shape, group);
  for (int64_t step = 0; step < steps; ++step)
    parallel_for(units * unit_blocks, flops_of_a_block(shape) / 2, [&](int64_t begin, int64_t end) {
      const Scratch scratch(step_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / unit_blocks, block = i % unit_blocks;
        if (block < blocks_of(kernels, shape, size_of(unit)))
          kernels.step(args, step, unit * group, size_of(unit), block, memory + unit * unit_bytes,
                       scratch.data());
      }
    });
}

}  // namespace mvit
