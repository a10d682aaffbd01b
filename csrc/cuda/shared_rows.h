// SPDX-License-Identifier: Apache-2.0
// Strides in shared memory, shared by kernels and host.
#pragma once

namespace mvit {

// Stride in bytes of rows of `columns` (a multiple of 8) 16-bit elements in shared memory: an odd number of 16-byte
// units, so that the eight rows of an ldmatrix matrix hit different banks.
constexpr int shared_row_bytes(int columns) { return 16 * (columns / 8 | 1); }

// The same where eight lanes read four adjacent units of each of two adjacent rows (lane_rows.h): a number of units that
// is 4 more than a multiple of 8.
constexpr int lane_row_bytes(int columns) { return 16 * (columns / 8 + ((4 - columns / 8) & 7)); }

// Bytes of a matrix in lines (lane_rows.h), of rows of `units` units of 16 bytes. Where 16 columns are left, an odd
// number of units for two rows puts rows r and r + 8 of them, which lanes read at once, into different banks.
constexpr int line_pair_bytes(int units) { return 16 * (2 * units + (units % 4 != 0)); }
constexpr int line_bytes(int rows, int units) { return rows / 2 * line_pair_bytes(units); }

}  // namespace mvit
