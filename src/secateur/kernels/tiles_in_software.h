// The matrix unit's instructions as plain loops, for machines that have none and for sanitizers, which do not see what an
// instruction of it reads and writes: built with -DSECATEUR_TILES_IN_SOFTWARE=ON, never for use.
//
// Everything here is static: each file keeps its own tiles.
#pragma once
#include <string.h>

#include "numbers.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig in_software::loadconfig
#define _tile_release in_software::release
#define _tile_zero in_software::zero
#define _tile_loadd in_software::loadd
#define _tile_stored in_software::stored
#define _tile_dpbf16ps in_software::dpbf16ps
#define _tile_dpbssd in_software::dpbssd

namespace {
namespace in_software {

struct Unit {
  uint8_t bytes[8], rows[8];
  uint8_t at[8][16][64];
};

thread_local Unit unit;

inline void zero(int tile) { memset(unit.at[tile], 0, sizeof unit.at[tile]); }

inline void loadconfig(const void* shape) {
  const uint8_t* const from = static_cast<const uint8_t*>(shape);  // palette at 0, bytes of a row at 16, rows at 48
  if (from[0] != 1) __builtin_trap();
  for (int tile = 0; tile < 8; tile++) {
    unit.bytes[tile] = from[16 + 2 * tile];
    unit.rows[tile] = from[48 + tile];
    if (unit.bytes[tile] > 64 || unit.rows[tile] > 16) __builtin_trap();
    zero(tile);
  }
}

inline void release() { memset(&unit, 0, sizeof unit); }

inline void loadd(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < unit.rows[tile]; row++)
    memcpy(unit.at[tile][row], static_cast<const uint8_t*>(from) + row * stride, unit.bytes[tile]);
}

inline void stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < unit.rows[tile]; row++)
    memcpy(static_cast<uint8_t*>(to) + row * stride, unit.at[tile][row], unit.bytes[tile]);
}

// Each product of a row of the first operand with columns of the second, of which a row holds several steps of each column.
template <class Element, class Sum, class Widen>
inline void add_products(int sums, int first, int second, Widen of) {
  enum { STEPS = sizeof(Sum) / sizeof(Element) };
  // What an operand must be, or the instruction faults.
  if (unit.rows[sums] != unit.rows[first] || unit.bytes[sums] != unit.bytes[second]) __builtin_trap();
  if (unit.bytes[first] != 4 * unit.rows[second]) __builtin_trap();
  for (int row = 0; row < unit.rows[sums]; row++)
    for (int k = 0; k < unit.rows[second]; k++)
      for (int column = 0; column < unit.bytes[sums] / int(sizeof(Sum)); column++) {
        Sum sum;
        Element left[STEPS], right[STEPS];
        memcpy(&sum, unit.at[sums][row] + column * sizeof(Sum), sizeof(Sum));
        memcpy(left, unit.at[first][row] + k * sizeof(Sum), sizeof left);
        memcpy(right, unit.at[second][k] + column * sizeof(Sum), sizeof right);
        for (int step = 0; step < STEPS; step++) sum += of(left[step]) * of(right[step]);
        memcpy(unit.at[sums][row] + column * sizeof(Sum), &sum, sizeof(Sum));
      }
}

inline void dpbf16ps(int sums, int first, int second) {
  add_products<bf16, float>(sums, first, second, [](bf16 value) { return widen(value); });
}

inline void dpbssd(int sums, int first, int second) {
  add_products<int8_t, int32_t>(sums, first, second, [](int8_t value) { return int32_t(value); });
}

}  // namespace in_software
}  // namespace
