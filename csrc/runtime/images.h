// SPDX-License-Identifier: Apache-2.0
// A caller's images as a network reads them, and its results as the caller gets them.
#pragma once

#include <cstdint>
#include <optional>

#include "../cpu/scratch.h"
#include "file.h"
#include "mvit_runtime.h"

namespace mvit {

// The images in the network's dtype; read in place if they are float32 and the network is, else a copy in `memory`,
// whose channels are adjacent. `wants_rows`: the network reads no other.
Images read_images(const mvit_images& given, const NetworkFile& file, int64_t channels, bool wants_rows,
                   std::optional<Scratch>& memory);

// The first file.channels channels of a result, rounded as PyTorch's would be, as floats.
void write_result(const Images& made, const NetworkFile& file, mvit_layout layout, float* result);

}  // namespace mvit
