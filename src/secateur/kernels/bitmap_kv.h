// The attention of one new token to a past that is packed (formats/bitmap_kv.py) and to the newest tokens as they are.
//
// A tile is 32 tokens of one head. Of keys a word says which tokens of the tile keep one channel; of values, which of 32
// channels one token keeps. Every tile of a cache keeps equally many elements.
#pragma once
#include "kernels.h"

enum { TILE = 32 };

struct BitmapKV {
  int64_t heads, group;        // heads of the cache, and of queries for each; an item is one head of one text
  int64_t width;               // channels of a head
  int64_t tiles, room;         // in use, and there is room for
  int64_t key_kept, value_kept;  // elements of a tile
  int64_t tail, tail_room;     // the newest tokens, as they are, and how many there is room for
  const uint32_t* key_bits;    // [items, room, width]
  const void* key_values;      // [items, room, key_kept], channel after channel
  const uint32_t* value_bits;  // [items, room, TILE, words], words = width / 32 rounded up
  const void* value_values;    // [items, room, value_kept], token after token
  const void* keys;            // [items, tail_room, width]
  const void* values;          // likewise
  const void* query;           // [items, group, width]
  const float* bias;           // [texts, tiles * TILE + tail], added to the scores; or null
  void* out;                   // [items, group, width]
  float scaling;
};
