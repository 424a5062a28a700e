// How many rows and bytes the tiles of the matrix unit have.
#pragma once
#include <stdint.h>

#ifdef SECATEUR_TILES_IN_SOFTWARE
#include "tiles_in_software.h"
#endif

namespace {

struct alignas(64) Shape {  // what _tile_loadconfig reads
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

}  // namespace
