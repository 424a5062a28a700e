// Words of a bitmap that expand into a tile of the matrix unit as they stand, a row each.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include <immintrin.h>

#include "numbers.h"

namespace {

enum { TILE_STEPS = 16, TILE_VALUES = 512 };
enum { FAR = 1024, WORDS_FAR = 512 };  // bytes that are asked for ahead; streams of whole tiles outrun themselves with more

// Where some words have got to, and the values that come next.
struct TileWords {
  const uint32_t* words;
  const bf16* values;
  int lines;  // of 64 bytes that the values of a tile take, and a little more

  // `kept` of so many values are kept.
  void begin(const uint32_t* from, const bf16* first, int64_t kept, int64_t of) {
    words = from;
    values = first;
    const int64_t all = 2 * kept * TILE_VALUES / of / 64 + 2;
    lines = all < TILE_STEPS ? int(all) : int(TILE_STEPS);
  }

  void ask_ahead() const {
    _mm_prefetch(reinterpret_cast<const char*>(words) + WORDS_FAR, _MM_HINT_T0);  // those of a tile are a line
    const char* const ahead = reinterpret_cast<const char*>(values) + FAR;
    for (int line = 0; line < lines; line++) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
  }

  void one(bf16* to, uint32_t word) {
    _mm512_store_si512(to, _mm512_maskz_expandloadu_epi16(word, values));
    values += __builtin_popcount(word);
  }

  // A tile of up to sixteen words; what is missing is zero.
  void expand(bf16* to, int count) {
    ask_ahead();
    if (count == TILE_STEPS) {
#pragma GCC unroll 16
      for (int step = 0; step < TILE_STEPS; step++) one(to + 32 * step, words[step]);
    } else {
      for (int step = 0; step < count; step++) one(to + 32 * step, words[step]);
      for (int step = count; step < TILE_STEPS; step++) _mm512_store_si512(to + 32 * step, _mm512_setzero_si512());
    }
    words += count;
  }

  // Words of which W belong together: of sixteen such, a tile for the first of each, for the second, and so on.
  template <int W>
  void expand_apart(bf16 (&to)[W][TILE_VALUES]) {
    for (int word = 0; word < TILE_STEPS * W; word += TILE_STEPS, words += TILE_STEPS) {
      ask_ahead();
#pragma GCC unroll 16
      for (int step = 0; step < TILE_STEPS; step++)
        one(to[(word + step) % W] + (word + step) / W * 32, words[step]);
    }
  }
};

}  // namespace
