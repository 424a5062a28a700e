// What is packed goes through the matrix unit, which takes pairs of bf16 and a row of sixteen of them for each step. A word
// expands into a row as it stands, 32 tokens of one channel or 32 channels of one token, two neighbours a pair: a query is a
// first operand twice, for the even ones of each pair and for the odd ones, with zeros for the others, and so has two rows of
// sums. What is expanded, sixteen words, serves eight queries of a head in one instruction.
//
// Weights of tokens are handed over as the sum of two bf16, so that no more is lost of them than of what rounding to 16 bits
// leaves. The zeros meet neighbours: where one of those is not finite a sum is NaN that need not be, and vectors compute the
// query again. One query by itself is as fast by vectors.
#include "bitmap_kv_attend.h"
#include "tile_words.h"
#include "tiles.h"

namespace {

enum { STEPS = TILE_STEPS, VALUES = TILE_VALUES, ABREAST = 2 };  // the last: of streams

// Tiles 0 to 3 hold sums, 4 and 5 first operands, 6 and 7 what is expanded.
inline void configure(int rows) {
  Shape shape = {};
  shape.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    shape.bytes[tile] = 64;
    shape.rows[tile] = tile > 5 ? STEPS : rows;
  }
  _tile_loadconfig(&shape);
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// A tile's number is a part of the instruction: of sums, and of what is expanded for them.
#define EACH_SUM(DO) DO(0, 6) DO(1, 7) DO(2, 6) DO(3, 7)

template <int G>
struct ByTiles {
  Head<G, bf16>& head;

  // Queries as first operands, [tiles, 2 * G, 16]: for the even ones of each pair, and for the odd ones.
  void begin() {
    const int64_t width = head.call.width;
    for (int64_t channel = 0; channel < (width + STEPS - 1) / STEPS * STEPS; channel++)
      for (int g = 0; g < G; g++) {
        const uint32_t bits = channel < width ? bits_of_float(head.query[g * head.words * 32 + channel]) : 0;
        uint32_t* const to = head.spare + (channel / STEPS * 2 * G + g) * STEPS + channel % STEPS;
        to[0] = bits >> 16;
        to[G * STEPS] = bits;
      }
    configure(2 * G);
  }

  void scores(int64_t from, int64_t tiles) { some_scores<1>(from, some_scores<ABREAST>(from, 0, tiles), tiles); }

  void values(int64_t from, int64_t tiles) {
    head.by_words(from, tiles, [&](auto words) { values_of<decltype(words)::value>(from, tiles); });
  }

  static int left_of(int64_t width, int64_t step) {
    const int64_t left = width - step * STEPS;
    return left < STEPS ? int(left) : int(STEPS);
  }

  // Of the tiles of tokens from `from` on those from `tile` up to `tiles`, P at once; where it came to is returned.
  template <int P>
  int64_t some_scores(int64_t from, int64_t tile, int64_t tiles) {
    const BitmapKV& call = head.call;
    const int64_t apart = (tiles - tile) / P, steps = (call.width + STEPS - 1) / STEPS;
    alignas(64) bf16 buffer[2][P][VALUES];  // one is filled while the unit works on the other
    alignas(64) float sums[2 * G][STEPS];
    for (int64_t end = tile + apart; tile < end; tile++) {
      TileWords streams[P];
      for (int p = 0; p < P; p++) {
        const int64_t place = head.item * call.room + from + tile + p * apart;
        streams[p].begin(call.key_bits + place * call.width, static_cast<const bf16*>(call.key_values) + place * call.key_kept,
                         call.key_kept, TILE * call.width);
        streams[p].expand(buffer[0][p], left_of(call.width, 0));
      }
      clear();
      for (int64_t step = 0; step < steps; step++) {
        const int left = left_of(call.width, step + 1);
        _tile_loadd(4, head.spare + step * 2 * G * STEPS, 64);
#define ADD(p, expanded)                                                          \
  if constexpr (P > p) {                                                          \
    _tile_loadd(expanded, buffer[step % 2][p], 64);                               \
    _tile_dpbf16ps(p, 4, expanded);                                               \
    if (left > 0) streams[p].expand(buffer[(step + 1) % 2][p], left);             \
  }
        EACH_SUM(ADD)
#undef ADD
      }
#define TAKE(p, expanded)                                                                     \
  if constexpr (P > p) {                                                                      \
    _tile_stored(p, sums, 64);                                                                \
    for (int g = 0; g < G; g++) {                                                             \
      const Pair in_order = ordered({_mm512_load_ps(sums[g]), _mm512_load_ps(sums[G + g])}, bf16()); \
      float* const to = head.score + g * (head.CHUNK + BEHIND) + (tile + p * apart) * TILE;   \
      _mm512_storeu_ps(to, in_order.a);                                                       \
      _mm512_storeu_ps(to + 16, in_order.b);                                                  \
    }                                                                                         \
  }
      EACH_SUM(TAKE)
#undef TAKE
    }
    return tile + (P - 1) * apart;
  }

  // The weights of sixteen tokens as first operands, for even channels and for odd ones: their upper halves, and the rest.
  struct Weights {
    alignas(64) uint32_t upper[2 * G][STEPS], rest[2 * G][STEPS];
  };

  void take_weights(int64_t token, Weights& to) const {
    const __m512i first_half = _mm512_set1_epi32(0xffff0000);
    for (int g = 0; g < G; g++) {
      const __m512 weight = _mm512_loadu_ps(head.score + g * (head.CHUNK + BEHIND) + token);
      const __m512i upper = _mm512_and_si512(_mm512_castps_si512(weight), first_half);
      const __m512i rest = _mm512_castps_si512(_mm512_sub_ps(weight, _mm512_castsi512_ps(upper)));
      _mm512_store_si512(to.upper[g], _mm512_srli_epi32(upper, 16));
      _mm512_store_si512(to.upper[G + g], upper);
      _mm512_store_si512(to.rest[g], _mm512_srli_epi32(rest, 16));
      _mm512_store_si512(to.rest[G + g], _mm512_and_si512(rest, first_half));
    }
  }

  template <int W>
  void multiply(const bf16 (&expanded)[W][VALUES], const Weights& weights) const {
    _tile_loadd(4, weights.upper, 64);
    _tile_loadd(5, weights.rest, 64);
#define ADD(word, from)                    \
  if constexpr (W > word) {                \
    _tile_loadd(from, expanded[word], 64); \
    _tile_dpbf16ps(word, 4, from);         \
    _tile_dpbf16ps(word, 5, from);         \
  }
    EACH_SUM(ADD)
#undef ADD
  }

  // Streams take turns and add to the same sums. What is expanded is multiplied a turn later, when it is in the cache.
  template <int W, int P>
  int64_t some_values(int64_t from, int64_t tile, int64_t tiles) {
    const BitmapKV& call = head.call;
    const int64_t apart = (tiles - tile) / P;
    alignas(64) bf16 buffer[2][W][VALUES];
    Weights weights[2];
    int64_t turn = 0;
    for (int64_t end = tile + apart; tile < end; tile++) {
      TileWords streams[P];
      for (int p = 0; p < P; p++) {
        const int64_t place = head.item * call.room + from + tile + p * apart;
        streams[p].begin(call.value_bits + place * TILE * W,
                         static_cast<const bf16*>(call.value_values) + place * call.value_kept, call.value_kept,
                         TILE * W * 32);
      }
      for (int token = 0; token < TILE; token += STEPS)
        for (int p = 0; p < P; p++, turn++) {
          streams[p].expand_apart(buffer[turn % 2]);
          take_weights((tile + p * apart) * TILE + token, weights[turn % 2]);
          if (turn) multiply<W>(buffer[(turn + 1) % 2], weights[(turn + 1) % 2]);
        }
    }
    if (turn) multiply<W>(buffer[(turn + 1) % 2], weights[(turn + 1) % 2]);
    return tile + (P - 1) * apart;
  }

  template <int W>
  void values_of(int64_t from, int64_t tiles) {
    alignas(64) float sums[2 * G][STEPS];
    clear();
    some_values<W, 1>(from, some_values<W, ABREAST>(from, 0, tiles), tiles);
#define TAKE(word, expanded)                                              \
  if constexpr (W > word) {                                               \
    _tile_stored(word, sums, 64);                                         \
    for (int g = 0; g < G; g++)                                           \
      for (int odd = 0; odd < 2; odd++) {                                 \
        __m512* const to = head.sum + (g * W + word) * 2 + odd;           \
        *to = _mm512_add_ps(*to, _mm512_load_ps(sums[odd * G + g]));      \
      }                                                                   \
  }
    EACH_SUM(TAKE)
#undef TAKE
  }
};

struct Tiled {
  enum { AT_ONCE = 8 };  // rows of a tile, two each

  template <int G>
  static void run(Head<G, bf16>& head, const bf16* from, bf16* to) {
    if constexpr (G > 1) {
      ByTiles<G> tiles{head};
      const bool finite = head.run(tiles, from, to);
      _tile_release();
      if (finite) return;
    }
    one_by_one(head, from, to);
  }
};

}  // namespace

extern "C" void bitmap_kv_attend_bf16_amx(const void* call, int64_t begin, int64_t end) { attend<bf16, Tiled>(call, begin, end); }
