// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mvit {

// Bytes from row to row in shared memory, for rows of `columns` (a multiple of 8) sixteen-bit elements: an odd number
// of 16-byte units, so that the eight rows of a matrix lie in different banks.
constexpr int shared_row_bytes(int columns) { return 16 * (columns / 8 | 1); }

}  // namespace mvit
