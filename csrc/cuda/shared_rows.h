// SPDX-License-Identifier: Apache-2.0
// Row stride in shared memory, shared by kernels and host.
#pragma once

namespace mvit {

// Stride in bytes of rows of `columns` (a multiple of 8) 16-bit elements in shared memory: an odd number of 16-byte
// units, so that the eight rows of an ldmatrix matrix hit different banks.
constexpr int shared_row_bytes(int columns) { return 16 * (columns / 8 | 1); }

}  // namespace mvit
