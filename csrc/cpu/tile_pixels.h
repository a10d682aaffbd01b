// SPDX-License-Identifier: Apache-2.0
// What convolutions and inverted residuals on matrix tiles share: packed weights, how the pixels of a map's rows are
// divided into tiles, and how results are written.
#pragma once

#include "panels.h"
#include "tile_product.h"

namespace mvit {
namespace MVIT_ISA {

constexpr int64_t kTileElements = kTileBytes / 2;

// ---- weights: [16 columns][step of 32][pair][column][2], zeros where there are no more columns or values ------------

MVIT_INLINE int64_t tile_weights_size(int64_t columns, int64_t steps) {
  return round_up(columns, kTile) / kTile * steps * kTileElements;
}

// at(column, step, k) is the k-th of up to 32 values of a step, null beyond them.
template <typename At>
void pack_tile_weights(bfloat16* packed, int64_t columns, int64_t steps, const At& at) {
  for (int64_t first = 0; first < columns; first += kTile)
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t k = 0; k < kTileDepth; ++k)
        for (int64_t i = 0; i < kTile; ++i) {
          const bfloat16* value = first + i < columns ? at(first + i, step, k) : nullptr;
          packed[(first / kTile * steps + step) * kTileElements + k / 2 * 2 * kTile + 2 * i + k % 2] =
              value != nullptr ? *value : bfloat16{0};
        }
}

MVIT_INLINE TileOperand weights_from(const bfloat16* packed, int64_t column, int64_t steps) {
  return {reinterpret_cast<const char*>(packed + column / kTile * steps * kTileElements), steps * kTileBytes, kTileBytes,
          64};
}

// Calls body(std::integral_constant<int, N>, column) for the columns from `column` on: two tiles if there are that many.
template <typename Body>
MVIT_INLINE void with_tile_columns(int64_t column, int64_t columns, const Body& body) {
  if (columns - column > kTile)
    body(std::integral_constant<int, 2>{}, column);
  else
    body(std::integral_constant<int, 1>{}, column);
}

// ---- pixels ---------------------------------------------------------------------------------------------------------

// Pairs of a step's values that a pixel has. Where that is less than a step, tiles are as shallow: what follows is the next
// pixel, and a NaN there times a weight of zero would be one here.
MVIT_INLINE int pairs_of(const Map& map) {
  return static_cast<int>(smaller(kTileDepth, map.channel_step)) / 2;
}

// Tiles of the pixels of rows. A tile is within a row, since its pixels are equally far apart; the last one of a row
// starts where it ends with the row, so it overlaps the one before, and the same bits are written twice. Only in rows
// that are narrower than a tile there are rows of a tile without a pixel.
struct TiledRows {
  int64_t width;
  int rows, present;  // rows of a tile, and those that are pixels
  int64_t per_row;

  // Two products of 8 rows take 5.5 ns, one of 16 takes 4.3.
  static MVIT_INLINE int rows_for(int64_t pixels) { return pixels <= kTile / 2 ? kTile / 2 : kTile; }

  MVIT_INLINE TiledRows(int64_t pixels, int tile_rows)
      : width(pixels),
        rows(tile_rows),
        present(static_cast<int>(smaller(pixels, rows))),
        per_row(round_up(pixels, rows) / rows) {}

  // Column of the first pixel of a row's i-th tile.
  MVIT_INLINE int64_t column(int64_t i) const { return width < rows ? 0 : smaller(i * rows, width - rows); }
};

// Calls body(std::integral_constant<int, M>, row, column, next row, next column) for blocks of M = 2 tiles, and M = 1 for
// an odd last one, of rows [begin, end): where the first and the second tile start.
template <typename Body>
MVIT_INLINE void in_tile_blocks(const TiledRows& tiled, int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin, tile = 0;
  while (row < end) {
    const int64_t first_row = row, first = tiled.column(tile);
    if (++tile == tiled.per_row) ++row, tile = 0;
    if (row == end) return body(std::integral_constant<int, 1>{}, first_row, first, first_row, first);
    const int64_t second_row = row, second = tiled.column(tile);
    if (++tile == tiled.per_row) ++row, tile = 0;
    body(std::integral_constant<int, 2>{}, first_row, first, second_row, second);
  }
}

// Where the results of a block's rows go, in bytes from the first one's place: a table, since a block's two tiles may be
// anywhere, and rows without a pixel go to a place that nobody reads. Blocks alternate between two tables, because the
// rows of one are written during the next; usually neither changes.
class RowPlaces {
 public:
  // row_bytes: from a row's place to the next one's in a tile.
  MVIT_INLINE RowPlaces(int rows, int present, int64_t row_bytes) : rows_(rows), present_(present), row_bytes_(row_bytes) {}

  // second: of the second tile's first row. nowhere: of rows without a pixel.
  MVIT_INLINE const int64_t* of(int64_t second, int64_t nowhere) {
    Table& table = tables_[next_ ^= 1];
    if (table.second != second || (present_ < rows_ && table.nowhere != nowhere)) {
      table.second = second;
      table.nowhere = nowhere;
      for (int tile = 0; tile < 2; ++tile)
        for (int row = 0; row < rows_; ++row)
          table.places[tile * rows_ + row] = row < present_ ? tile * second + row * row_bytes_ : nowhere;
    }
    return table.places;
  }

 private:
  struct Table {
    int64_t second = INT64_MIN, nowhere = 0;
    int64_t places[kBlockSide];
  };
  const int rows_, present_;
  const int64_t row_bytes_;
  int next_ = 0;
  Table tables_[2];
};

// ---- SiLU among tile instructions ------------------------------------------------------------------------------------

// Until some 80 ns after a tile instruction of any kind, one of the two ports for 512-bit multiply-adds, vreduce and vscalef
// is off; additions, permutations and comparisons still have both. So e^-x = 2^w · 2^rest, with w rounded to a multiple of
// 1/16 by an addition, 2^(fraction of w) from a table and 2^rest = a + b · rest, to 1.2e-4; a and b are in the tables. Beside
// products 64 vectors take 165 ns instead of 195, elsewhere 112 instead of 104 (silu_for).
struct PowersOfTwo {
  alignas(64) float start[16], slope[16];
};
alignas(64) constexpr PowersOfTwo kTilePowers = [] {
  constexpr double powers[16] = {1,
                                 1.0442737824274138,
                                 1.0905077326652577,
                                 1.1387886347566916,
                                 1.189207115002721,
                                 1.2418578120734840,
                                 1.2968395546510096,
                                 1.3542555469368927,
                                 1.4142135623730951,
                                 1.4768261459394993,
                                 1.5422108254079408,
                                 1.6104903319492543,
                                 1.6817928305074290,
                                 1.7562521603732995,
                                 1.8340080864093424,
                                 1.9152065613971474};
  PowersOfTwo tables{};
  for (int i = 0; i < 16; ++i) {
    tables.start[i] = static_cast<float>(powers[i] * 1.000117);
    tables.slope[i] = static_cast<float>(powers[i] * 0.693147);
  }
  return tables;
}();
MVIT_INLINE Vec<float> silu_beside_tiles(Vec<float> x) {
  const Vec<float> scale(-1.44269504f), round(1.5f * (1 << 19));
  const Vec<float> shifted = fma(x, scale, round), whole = shifted - round;
  // Infinity minus infinity would make NaN of SiLU(infinity).
  const __mmask16 finite = _mm512_cmp_ps_mask(shifted.native, Vec<float>(-__builtin_inff()).native, _CMP_NEQ_UQ);
  const Vec<float> rest(_mm512_maskz_fmsub_ps(finite, x.native, scale.native, whole.native));
  const auto entry = [&](const float* table) {
    return Vec<float>(_mm512_maskz_permutexvar_ps(-1, _mm512_castps_si512(shifted.native), _mm512_load_ps(table)));
  };
  const Vec<float> power = fma(entry(kTilePowers.slope), rest, entry(kTilePowers.start));
  const Vec<float> e(_mm512_maskz_scalef_ps(-1, power.native, whole.native));
  return x * Vec<float>(_mm512_maskz_rcp14_ps(-1, (Vec<float>(1.0f) + e).native));
}

// ---- results --------------------------------------------------------------------------------------------------------

// Channels of a pixel that are written, of 32 or 16 results from `column` on.
MVIT_INLINE __mmask32 written_channels(const Map& map, int64_t channels, int64_t column) {
  const int64_t count = smaller(kBlockSide, map.room(channels) - column);
  return count == kBlockSide ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

MVIT_INLINE void store_channels(char* p, const Vec<float> (&v)[2], __mmask32 channels) {
  look_at(reinterpret_cast<bfloat16*>(p), __builtin_popcount(channels));
  _mm512_mask_storeu_epi16(p, channels, (__m512i)_mm512_cvtne2ps_pbh(v[1].native, v[0].native));
}
// In halves, since a pixel of 16 channels may begin in the middle of a cache line; zeros above.
MVIT_INLINE void store_channels(char* p, const Vec<float> (&v)[1], __mmask32 channels) {
  look_at(reinterpret_cast<bfloat16*>(p), __builtin_popcount(channels));
  const auto lower = static_cast<__mmask16>(channels), upper = static_cast<__mmask16>(channels >> 16);
  _mm256_mask_storeu_epi16(p, lower, (__m256i)_mm512_maskz_cvtneps_pbh(-1, v[0].native));
  _mm256_mask_storeu_epi16(p + 32, upper, _mm256_setzero_si256());
}

}  // namespace MVIT_ISA
}  // namespace mvit
