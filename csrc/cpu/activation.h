// SPDX-License-Identifier: Apache-2.0
// The activation that a convolution applies to its result, as a word of a frozen network's program.
#pragma once

#include <cstdint>

namespace mvit {

enum class Activation : int64_t { none, silu, relu };

inline bool is_activation(int64_t word) { return word >= 0 && word <= static_cast<int64_t>(Activation::relu); }

}  // namespace mvit
