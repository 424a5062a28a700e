// Two numbers of bf16 are multiplied as one, by two that they meet: an instruction takes pairs and adds both products. Keys of
// two channels meet two numbers of a query, values of two tokens the weights of both. What two words expand into is interleaved
// within 128 bits, which changes the order of lanes: it is put right where sums leave the registers.
//
// Weights of tokens are floats, and where many of a chunk weigh something its values are multiplied by floats. Otherwise they
// are rounded to bf16, as torch's own attention rounds all of them, and what that loses of tokens that have more than SLIGHT
// of all weight so far with some query is added afterwards. Of many slight weights, some rounded up and some down, no more is
// lost than by rounding the outcome.
//
// A zero meets a neighbour: where that is not finite a sum is NaN that need not be, and vectors compute the query again.
#include "bitmap_kv_attend.h"

namespace {

const float SLIGHT = 1.0f / 1024;

template <int G>
struct ByPairs {
  enum { ABREAST = G < 2 ? 4 : G < 3 ? 2 : 1 };  // tiles
  Head<G, bf16>& head;

  // Queries as scores reads them: two channels of each, side by side, [pairs, G, 2].
  void begin() {
    uint32_t* to = head.spare;
    for (int64_t channel = 0; channel < head.call.width; channel += 2)
      for (int g = 0; g < G; g++) {
        const float* const two = head.query + g * head.words * 32 + channel;  // zeros follow the last
        *to++ = bits_of_float(two[0]) >> 16 | (bits_of_float(two[1]) & 0xffff0000);
      }
  }

  void scores(int64_t from, int64_t tiles) { some_scores<1>(from, some_scores<ABREAST>(from, 0, tiles), tiles); }

  void values(int64_t from, int64_t tiles) {
    if constexpr (G < 3)
      head.values(from, tiles);  // which wait for memory
    else
      head.by_words(from, tiles, [&](auto words) { values_of<decltype(words)::value>(from, tiles); });
  }

  static void ask_ahead(const bf16* value) { _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0); }

  // Two words as pairs, the first and the last four of every eight.
  struct Both {
    __m512bh low, high;

    Both() {}
    Both(__m512i one, __m512i other)
        : low((__m512bh)_mm512_unpacklo_epi16(one, other)), high((__m512bh)_mm512_unpackhi_epi16(one, other)) {}

    void add(Pair& to, uint32_t two) const {
      const __m512bh by = (__m512bh)_mm512_set1_epi32(two);
      to = {_mm512_dpbf16_ps(to.a, low, by), _mm512_dpbf16_ps(to.b, high, by)};
    }
  };

  // Of the tiles from `from` on those from `tile` up to `tiles`, P at once; where it came to is returned.
  template <int P>
  int64_t some_scores(int64_t from, int64_t tile, int64_t tiles) {
    const BitmapKV& call = head.call;
    const int64_t apart = (tiles - tile) / P, width = call.width;
    for (int64_t end = tile + apart; tile < end; tile++) {
      const int64_t place = head.item * call.room + from + tile;
      const uint32_t* const bits = call.key_bits + place * width;
      const uint32_t* asked = head.spare;
      const bf16* value[P];
      Pair s[P][G];
      for (int p = 0; p < P; p++) {
        value[p] = static_cast<const bf16*>(call.key_values) + (place + p * apart) * call.key_kept;
        for (int g = 0; g < G; g++) s[p][g] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      }
      __m512i one[P], other[P];
      const auto read = [&](int p, int64_t channel) __attribute__((always_inline)) {
        const uint32_t* const two = bits + p * apart * width + channel;
        one[p] = Head<G, bf16>::next(two[0], value[p]);
        other[p] = channel + 1 < width ? Head<G, bf16>::next(two[1], value[p]) : _mm512_setzero_si512();
        ask_ahead(value[p]);
      };
      const auto multiply = [&](int p, const Both& keys) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) keys.add(s[p][g], asked[g]);
      };
      if constexpr (P == 1) {  // two channels are expanded while those before them are multiplied
        read(0, 0);
        for (int64_t channel = 2; channel < width; channel += 2, asked += G) {
          const Both keys(one[0], other[0]);
          read(0, channel);
          multiply(0, keys);
        }
        multiply(0, Both(one[0], other[0]));
      } else {
        for (int64_t channel = 0; channel < width; channel += 2, asked += G)
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) {
            read(p, channel);
            multiply(p, Both(one[p], other[p]));
          }
      }
      const __m512i first_half = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
      const __m512i second_half = _mm512_add_epi32(first_half, _mm512_set1_epi32(8));
      for (int p = 0; p < P; p++)
        for (int g = 0; g < G; g++) {
          float* const to = head.score + g * (head.CHUNK + BEHIND) + (tile + p * apart) * TILE;
          _mm512_storeu_ps(to, _mm512_permutex2var_ps(s[p][g].a, first_half, s[p][g].b));
          _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(s[p][g].a, second_half, s[p][g].b));
        }
    }
    return tile + (P - 1) * apart;
  }

  // The values of a chunk, and what is known of the weights they meet. Tokens are counted from its beginning.
  struct Chunk {
    const uint32_t* bits;
    const bf16* values;
    int64_t heavy = 0;
    uint16_t token[SCORES / G];       // of those that have more than SLIGHT of all weight
    int32_t begins[SCORES / G / 2];  // where the values of every second token do
  };

  void find_heavy(int64_t tokens, Chunk& of) const {
    for (int64_t token = 0; token < tokens; token += 16) {
      uint32_t found = 0;
      for (int g = 0; g < G; g++)
        found |= _mm512_cmp_ps_mask(_mm512_loadu_ps(head.score + g * (head.CHUNK + BEHIND) + token),
                                    _mm512_set1_ps(head.so[g].whole * SLIGHT), _CMP_NLT_UQ);
      for (; found; found &= found - 1) of.token[of.heavy++] = uint16_t(token + __builtin_ctz(found));
    }
  }

  // Rounds weights, two tokens side by side, and leaves what that loses where they were.
  void round(int64_t tokens) const {
    for (int g = 0; g < G; g++)
      for (int64_t token = 0; token < tokens; token += 16) {
        float* const at = head.score + g * (head.CHUNK + BEHIND) + token;
        const __m512 weight = _mm512_loadu_ps(at);
        const __m256i near = (__m256i)_mm512_cvtneps_pbh(weight);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(head.pairs + (g * head.CHUNK + token) / 2), near);
        _mm512_storeu_ps(at, _mm512_sub_ps(weight, widen(near, bf16())));
      }
  }

  // By rounded weights. Of so many tiles from one on the words of a token from FIRST on, as many as there are registers for
  // their sums, then those after them: what is read again lies in the first cache, and what comes after is asked for all
  // the while.
  template <int W, int FIRST>
  void some_values(int64_t tile, int64_t tiles, Chunk& of) {
    enum { SOME = G > 5 ? 1 : 2, TURNS = (W + SOME - 1) / SOME };
    enum { LAST = FIRST + SOME < W ? FIRST + SOME : W, COUNT = LAST - FIRST };
    Pair s[G][COUNT];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; i++) s[g][i] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const uint32_t* bits = of.bits + tile * TILE * W;
    const bf16* value = of.values + tile * head.call.value_kept;  // of one tile after another
    int32_t* begin = of.begins + tile * TILE / 2;
    const uint32_t* by = head.pairs + tile * TILE / 2;
    const int64_t pairs = tiles * TILE / 2, bytes = tiles * head.call.value_kept * int64_t(sizeof(bf16));
    const int64_t step = bytes / (TURNS * pairs);
    const char* ask = reinterpret_cast<const char*>(value) + bytes + bytes * (FIRST / SOME) / TURNS;
    if (FIRST == 0) {
      const uint32_t* const after = bits + pairs * 2 * W;
      for (int64_t i = 0; i < pairs * 2 * W; i += 16) _mm_prefetch(reinterpret_cast<const char*>(after + i), _MM_HINT_T0);
    }
    __m512i token[2][COUNT];
    const auto read = [&]() __attribute__((always_inline)) {
      if (FIRST == 0) *begin++ = int32_t(value - of.values);
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++)
#pragma GCC unroll 4
        for (int word = 0; word < W; word++, bits++)
          if (word < FIRST || word >= LAST)
            value += __builtin_popcount(*bits);
          else
            token[i][word - FIRST] = Head<G, bf16>::next(*bits, value);
      _mm_prefetch(ask, _MM_HINT_T0);  // two lines: with few zeros a step is longer than one
      _mm_prefetch(ask + 64, _MM_HINT_T0);
      ask += step;
    };
    Both both[COUNT];
    const auto take = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) both[i] = Both(token[0][i], token[1][i]);
    };
    const auto multiply = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) both[i].add(s[g][i], by[g * head.CHUNK / 2]);
      by++;
    };
    read();
    for (int64_t pair = 1; pair < pairs; pair++) {
      take();
      read();
      multiply();
    }
    take();
    multiply();
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; i++) {
        // Even channels and odd ones, as head keeps them.
        __m512* const to = head.sum + (g * W + FIRST + i) * 2;
        to[0] = _mm512_add_ps(to[0], _mm512_shuffle_ps(s[g][i].a, s[g][i].b, _MM_SHUFFLE(2, 0, 2, 0)));
        to[1] = _mm512_add_ps(to[1], _mm512_shuffle_ps(s[g][i].a, s[g][i].b, _MM_SHUFFLE(3, 1, 3, 1)));
      }
    if constexpr (LAST < W) some_values<W, LAST>(tile, tiles, of);
  }

  // What was lost of the weights of some tokens.
  template <int W>
  void add_rest(const Chunk& of) {
    for (int64_t i = 0; i < of.heavy; i++) {
      const int64_t token = of.token[i];
      const uint32_t* bits = of.bits + token / 2 * 2 * W;
      const bf16* value = of.values + of.begins[token / 2];
      if (token % 2)
        for (int word = 0; word < W; word++) value += __builtin_popcount(*bits++);
      for (int word = 0; word < W; word++)
        head.add(word, halves(Head<G, bf16>::next(*bits++, value), bf16()), token, head.sum, 2 * W);
    }
  }

  template <int W>
  void values_of(int64_t from, int64_t tiles) {
    enum { AT_ONCE = 2, FEW = 8 };  // tiles; and one of how many tokens
    const int64_t place = head.item * head.call.room + from;
    Chunk chunk;
    chunk.bits = head.call.value_bits + place * TILE * W;
    chunk.values = static_cast<const bf16*>(head.call.value_values) + place * head.call.value_kept;
    find_heavy(tiles * TILE, chunk);
    if (chunk.heavy * FEW > tiles * TILE) return head.values(from, tiles);
    round(tiles * TILE);
    for (int64_t tile = 0; tile < tiles; tile += AT_ONCE)
      some_values<W, 0>(tile, tile + AT_ONCE < tiles ? int64_t(AT_ONCE) : tiles - tile, chunk);
    add_rest<W>(chunk);
  }
};

struct Paired {
  enum { AT_ONCE = 8 };  // queries, for which there are registers

  template <int G>
  static void run(Head<G, bf16>& head, const bf16* from, bf16* to) {
    ByPairs<G> pairs{head};
    if (!head.run(pairs, from, to)) one_by_one(head, from, to);
  }
};

}  // namespace

extern "C" void bitmap_kv_attend_bf16_avx512bf16(const void* call, int64_t begin, int64_t end) {
  attend<bf16, Paired>(call, begin, end);
}
