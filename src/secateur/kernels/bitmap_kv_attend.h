// Tokens go by in chunks whose scores fit in the first cache, with the softmax kept up to date as they do. A chunk is as long
// as that allows, since memory is slow to begin with what lies elsewhere, keys or values. A word of
// key bits expands into 32 tokens of one channel, so that a score is a lane and nothing is added across a register; a
// word of value bits into 32 channels of one token. What is expanded serves all the queries of a head.
//
// How what is packed is multiplied is handed in: by vectors, here, by pairs (bitmap_kv_attend_avx512bf16.cpp) or by the matrix
// unit (bitmap_kv_attend_amx.cpp). Everything is static: each file keeps the copy compiled with its own flags.
#pragma once
#include <type_traits>

#include "bitmap_kv.h"
#include "wide.h"

namespace {

enum {
  SCORES = 4096,  // of a chunk, of all queries
  BEHIND = 16,    // floats that may be read and written behind them
  AHEAD = 2048,   // bytes
  MOST = 8        // queries of a head that share what is expanded, at the very most
};

// 32 elements in two registers of 16 lanes. `lanes` of 16-bit types: the even ones and the odd ones for bf16, where
// both are one instruction away, the first and the last sixteen otherwise.
struct Pair {
  __m512 a, b;
};

inline Pair halves(__m512i both, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

inline Pair halves(__m512i both, f16) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}

inline Pair halves(Pair both, float) { return both; }

// What a word says of the values that come next, not in halves yet.
inline Pair expand(uint32_t word, const float* values) {
  return {_mm512_castsi512_ps(expanded(uint16_t(word), values)),
          _mm512_castsi512_ps(expanded(uint16_t(word >> 16), values + __builtin_popcount(word & 0xffff)))};
}

template <class T>
inline __m512i expand(uint32_t word, const T* values) {
  return expanded(word, values);
}

inline Pair dense(uint32_t lanes, const float* values) {
  return {_mm512_maskz_loadu_ps(__mmask16(lanes), values), _mm512_maskz_loadu_ps(__mmask16(lanes >> 16), values + 16)};
}

template <class T>
inline Pair dense(uint32_t lanes, const T* values) {
  return halves(_mm512_maskz_loadu_epi16(lanes, values), T());
}

// A pair in the order of its elements.
inline Pair ordered(Pair pair, float) { return pair; }
inline Pair ordered(Pair pair, f16) { return pair; }
inline Pair ordered(Pair pair, bf16) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(pair.a, low, pair.b), _mm512_permutex2var_ps(pair.a, high, pair.b)};
}

inline uint32_t some(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

// 2^x for x up to 0, to 2e-7 of it; 0 where it is below the smallest normal number. A NaN stays one.
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // what is above the whole number below
  __m512 sum = _mm512_set1_ps(0.00187757641f);  // of all polynomials of this degree nearest to 2^r, from 0 to 1
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.008989340732f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.05582631751f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.2401536172f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931530732f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.9999999251f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), sum, x);
}

// What one query knows so far: the largest score, and the sum of the weights.
struct So {
  float most, whole;
};

// Scores [count] of one chunk to weights, and by how much what was summed before is to be multiplied.
inline float weigh(float* score, int64_t count, float scaling, const float* bias, So* so) {
  const __m512 of_two = _mm512_set1_ps(1.44269504f);  // not before the largest is taken away: a bias may be the lowest float
  __m512 top = _mm512_set1_ps(so->most);
  for (int64_t token = 0; token < count; token += 16) {
    const __mmask16 lanes = first(count - token);
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(score + token), _mm512_set1_ps(scaling));
    if (bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes, bias + token));
    _mm512_storeu_ps(score + token, x);
    top = _mm512_mask_max_ps(top, lanes, x, top);  // a NaN is passed over here, and makes one of the sum
  }
  const float most = _mm512_reduce_max_ps(top);
  __m512 whole = _mm512_setzero_ps();
  for (int64_t token = 0; token < count; token += 16) {
    const __mmask16 lanes = first(count - token);
    // Where nothing may be seen yet there is nothing to take away, and all is 0 but what is no number.
    const __m512 less = _mm512_set1_ps(most == -__builtin_inff() ? 0 : most);
    const __m512 x = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(score + token), less), of_two));
    whole = _mm512_mask_add_ps(whole, lanes, whole, x);
    _mm512_storeu_ps(score + token, x);
  }
  const float before = so->most == -__builtin_inff() ? 0 : __builtin_expf(so->most - most);
  so->most = most;
  so->whole = so->whole * before + _mm512_reduce_add_ps(whole);
  return before;
}

// Where the calling thread keeps what it knows of the queries at hand.
struct Rooms {
  int64_t words;  // of a token
  float* sum;
  float* query;
  float* score;
  uint32_t* spare;
  uint32_t* pairs;

  explicit Rooms(const BitmapKV& call) : words((call.width + 31) / 32) {
    sum = static_cast<float*>(scratch((MOST * (words * 128 + BEHIND) + SCORES + SCORES / 2) * sizeof(float)));
    query = sum + MOST * words * 32;
    score = query + MOST * words * 32;
    spare = reinterpret_cast<uint32_t*>(score + SCORES + MOST * BEHIND);
    pairs = spare + MOST * words * 64;
  }
};

template <int G, class T>
struct Head {
  enum {
    ABREAST = G == 1 ? 4 : G == 2 ? 2 : 1,  // tiles, for which there are registers
    CHUNK = SCORES / G / TILE * TILE        // tokens
  };
  const BitmapKV& call;
  const int64_t item, words;
  float* const query;   // [G, words * 32]
  float* const score;   // [G, CHUNK + BEHIND]
  __m512* const sum;    // [G, words] pairs
  uint32_t* const spare;  // [words * 64, G], for what else a query becomes
  uint32_t* const pairs;  // [G, CHUNK / 2], for weights of 16 bits
  So so[G];

  Head(const BitmapKV& all, int64_t which, const Rooms& rooms)
      : call(all), item(which), words(rooms.words), query(rooms.query), score(rooms.score),
        sum(reinterpret_cast<__m512*>(rooms.sum)), spare(rooms.spare), pairs(rooms.pairs) {}

  // Of the tiles from `from` on those from `tile` up to `tiles`, P at once, `apart` from one to the next: memory gives more to
  // several streams than to one. Where it came to is returned: what is no multiple of P is left.
  template <int P>
  int64_t packed_scores(int64_t from, int64_t tile, int64_t tiles) {
    const int64_t apart = (tiles - tile) / P, width = call.width;
    const float* const asked = reinterpret_cast<const float*>(spare);
    for (int64_t end = tile + apart; tile < end; tile++) {
      const int64_t place = item * call.room + from + tile;
      const uint32_t* bits = call.key_bits + place * width;
      const T* value[P];
      Pair s[P][G];
      for (int p = 0; p < P; p++) {
        value[p] = static_cast<const T*>(call.key_values) + (place + p * apart) * call.key_kept;
        for (int g = 0; g < G; g++) s[p][g] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      }
      for (int64_t channel = 0; channel < width; channel++, bits++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          const Pair key = halves(next(bits[p * apart * width], value[p]), T());
          ask_ahead(value[p], channel);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) {
            const __m512 q = _mm512_set1_ps(asked[channel * G + g]);
            s[p][g] = {_mm512_fmadd_ps(key.a, q, s[p][g].a), _mm512_fmadd_ps(key.b, q, s[p][g].b)};
          }
        }
      for (int p = 0; p < P; p++)
        for (int g = 0; g < G; g++) {
          const Pair in_order = ordered(s[p][g], T());
          float* const to = score + g * (CHUNK + BEHIND) + (tile + p * apart) * TILE;
          _mm512_storeu_ps(to, in_order.a);
          _mm512_storeu_ps(to + 16, in_order.b);
        }
    }
    return tile + (P - 1) * apart;
  }

  static inline auto next(uint32_t word, const T*& value) {
    const auto found = expand(word, value);
    value += __builtin_popcount(word);
    return found;
  }

  // At each step of a stream, of which two take a line at most in 16 bits.
  inline void ask_ahead(const T* value, int64_t step) {
    if (sizeof(T) == 4 || step % 2) _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0);
  }

  void tail_scores(int64_t from, int64_t count) {
    const T* key = static_cast<const T*>(call.keys) + (item * call.tail_room + from) * call.width;
    for (int64_t token = 0; token < count; token++, key += call.width) {
      Pair s[G];
      for (int g = 0; g < G; g++) s[g] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t word = 0; word < words; word++) {
        const Pair k = ordered(dense(some(call.width - word * 32), key + word * 32), T());
        for (int g = 0; g < G; g++) {
          const float* const q = query + (g * words + word) * 32;
          s[g] = {_mm512_fmadd_ps(k.a, _mm512_loadu_ps(q), s[g].a),
                  _mm512_fmadd_ps(k.b, _mm512_loadu_ps(q + 16), s[g].b)};
        }
      }
      for (int g = 0; g < G; g++) score[g * (CHUNK + BEHIND) + token] = _mm512_reduce_add_ps(_mm512_add_ps(s[g].a, s[g].b));
    }
  }

  void soften(int64_t from, int64_t count) {
    const int64_t tokens = call.tiles * TILE + call.tail;
    const float* const bias = call.bias ? call.bias + item / call.heads * tokens + from : nullptr;
    for (int g = 0; g < G; g++) {
      const __m512 before = _mm512_set1_ps(weigh(score + g * (CHUNK + BEHIND), count, call.scaling, bias, so + g));
      for (int64_t i = 0; i < 2 * words; i++) sum[g * 2 * words + i] = _mm512_mul_ps(sum[g * 2 * words + i], before);
    }
  }

  inline __attribute__((always_inline)) void add(int64_t word, Pair value, int64_t token, __m512* into, int64_t stride) {
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const __m512 weight = _mm512_set1_ps(score[g * (CHUNK + BEHIND) + token]);
      into[g * stride + 2 * word] = _mm512_fmadd_ps(value.a, weight, into[g * stride + 2 * word]);
      into[g * stride + 2 * word + 1] = _mm512_fmadd_ps(value.b, weight, into[g * stride + 2 * word + 1]);
    }
  }

  // Likewise of all W words of a token, their sums in registers for as long as a chunk lasts.
  template <int W, int P>
  int64_t packed_values_abreast(int64_t from, int64_t tile, int64_t tiles) {
    __m512 held[G * 2 * W];
#pragma GCC unroll 32
    for (int i = 0; i < G * 2 * W; i++) held[i] = sum[i];
    const int64_t apart = (tiles - tile) / P;
    for (int64_t end = tile + apart; tile < end; tile++) {
      const int64_t place = item * call.room + from + tile;
      const uint32_t* bits = call.value_bits + place * TILE * W;
      const T* value[P];
      for (int p = 0; p < P; p++)
        value[p] = static_cast<const T*>(call.value_values) + (place + p * apart) * call.value_kept;
      for (int64_t token = 0; token < TILE; token++)
#pragma GCC unroll 4
        for (int word = 0; word < W; word++, bits++)
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) {
            const uint32_t mask = bits[p * apart * TILE * W];
            add(word, halves(next(mask, value[p]), T()), (tile + p * apart) * TILE + token, held, 2 * W);
            ask_ahead(value[p], token * W + word);
          }
    }
#pragma GCC unroll 32
    for (int i = 0; i < G * 2 * W; i++) sum[i] = held[i];
    return tile + (P - 1) * apart;
  }

  // Of tiles [tile, end) the words of a token from FIRST on, as many as there are registers for their sums, then those after
  // them: what is read again lies in the first cache. A token is expanded while the one before it is multiplied.
  template <int W, int FIRST>
  void packed_values_in_turn(int64_t from, int64_t tile, int64_t end) {
    enum { SOME = G > 5 ? 1 : 2, LAST = FIRST + SOME < W ? FIRST + SOME : W, COUNT = LAST - FIRST, HELD = 2 * COUNT };
    __m512 held[G * HELD];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
      for (int i = 0; i < HELD; i++) held[g * HELD + i] = sum[(g * W + FIRST) * 2 + i];
    const int64_t place = item * call.room + from + tile;
    const uint32_t* bits = call.value_bits + place * TILE * W;
    const T* value = static_cast<const T*>(call.value_values) + place * call.value_kept;  // of one tile after another
    decltype(next(0, value)) now[COUNT], then[COUNT];
    const auto read = [&](decltype(next(0, value))* to, int64_t token) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int word = 0; word < W; word++, bits++) {
        if (word < FIRST || word >= LAST)
          value += __builtin_popcount(*bits);
        else
          to[word - FIRST] = next(*bits, value);
        if (FIRST == 0) ask_ahead(value, token * W + word);
      }
    };
    const auto multiply = [&](int64_t token) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int word = 0; word < COUNT; word++) add(word, halves(now[word], T()), token, held, HELD);
    };
    int64_t token = tile * TILE;
    read(now, token);
    for (; token < end * TILE - 1; token++) {
      read(then, token + 1);
      multiply(token);
#pragma GCC unroll 4
      for (int word = 0; word < COUNT; word++) now[word] = then[word];
    }
    multiply(token);
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
      for (int i = 0; i < HELD; i++) sum[(g * W + FIRST) * 2 + i] = held[g * HELD + i];
    if constexpr (LAST < W) packed_values_in_turn<W, LAST>(from, tile, end);
  }

  template <int W>
  void packed_values(int64_t from, int64_t tiles) {
    enum { AT_ONCE = 2 };  // tiles
    if constexpr (G > 2)
      for (int64_t tile = 0; tile < tiles; tile += AT_ONCE)
        packed_values_in_turn<W, 0>(from, tile, tile + AT_ONCE < tiles ? tile + AT_ONCE : tiles);
    else
      packed_values_abreast<W, 1>(from, packed_values_abreast<W, ABREAST>(from, 0, tiles), tiles);
  }

  void packed_values_of_any_width(int64_t from, int64_t tiles) {
    const uint32_t* bits = call.value_bits + (item * call.room + from) * TILE * words;
    const T* value = static_cast<const T*>(call.value_values) + (item * call.room + from) * call.value_kept;
    for (int64_t token = 0; token < tiles * TILE; token++)
      for (int64_t word = 0; word < words; word++) {
        add(word, halves(next(*bits++, value), T()), token, sum, 2 * words);
      }
  }

  void tail_values(int64_t from, int64_t count) {
    const T* value = static_cast<const T*>(call.values) + (item * call.tail_room + from) * call.width;
    for (int64_t token = 0; token < count; token++, value += call.width)
      for (int64_t word = 0; word < words; word++)
        add(word, dense(some(call.width - word * 32), value + word * 32), token, sum, 2 * words);
  }

  // Hands over how many words a token has, as a constant, where it is one to four.
  template <class Take>
  void by_words(int64_t from, int64_t tiles, Take take) {
    switch (words) {
      case 1: return take(std::integral_constant<int, 1>());
      case 2: return take(std::integral_constant<int, 2>());
      case 3: return take(std::integral_constant<int, 3>());
      case 4: return take(std::integral_constant<int, 4>());
      default: packed_values_of_any_width(from, tiles);
    }
  }

  // What is packed, of the tiles from one on, to scores and weighted values, by vectors.
  void scores(int64_t tile, int64_t count) { packed_scores<1>(tile, packed_scores<ABREAST>(tile, 0, count), count); }

  void values(int64_t tile, int64_t count) {
    if (words == 1) packed_values<1>(tile, count);
    else if (words == 2) packed_values<2>(tile, count);
    else if (words == 4) packed_values<4>(tile, count);
    else packed_values_of_any_width(tile, count);
  }

  // Queries as packed_scores reads them, side by side.
  void begin() {
    float* const asked = reinterpret_cast<float*>(spare);
    for (int64_t channel = 0; channel < call.width; channel++)
      for (int g = 0; g < G; g++) asked[channel * G + g] = query[g * words * 32 + channel];
  }

  // The queries to what they find. Returns whether that is finite.
  template <class By>
  bool run(By& by, const T* from, T* to) {
    for (int g = 0; g < G; g++) {
      so[g] = {-__builtin_inff(), 0};
      for (int64_t i = 0; i < words * 32; i += 16)
        _mm512_storeu_ps(query + g * words * 32 + i, load(from + g * call.width + i, first(call.width > i ? call.width - i : 0)));
      for (int64_t i = 0; i < 2 * words; i++) sum[g * 2 * words + i] = _mm512_setzero_ps();
    }
    by.begin();
    for (int64_t tile = 0; tile < call.tiles; tile += CHUNK / TILE) {
      const int64_t count = call.tiles - tile < CHUNK / TILE ? call.tiles - tile : int64_t(CHUNK / TILE);
      by.scores(tile, count);
      soften(tile * TILE, count * TILE);
      by.values(tile, count);
    }
    for (int64_t token = 0; token < call.tail; token += CHUNK) {
      const int64_t count = call.tail - token < CHUNK ? call.tail - token : int64_t(CHUNK);
      tail_scores(token, count);
      soften(call.tiles * TILE + token, count);
      tail_values(token, count);
    }
    __m512 wild = _mm512_setzero_ps();
    for (int g = 0; g < G; g++)
      for (int64_t word = 0; word < words; word++) {
        const __m512* const s = sum + (g * words + word) * 2;
        const Pair in_order = ordered({s[0], s[1]}, T());
        const __m512 share = _mm512_set1_ps(so[g].whole == 0 ? 0 : 1 / so[g].whole);
        wild = _mm512_fmadd_ps(_mm512_add_ps(s[0], s[1]), _mm512_setzero_ps(), wild);
        T* const out = to + g * call.width + word * 32;
        const int64_t left = call.width - word * 32;
        store(out, first(left), _mm512_mul_ps(in_order.a, share));
        if (left > 16) store(out + 16, first(left - 16), _mm512_mul_ps(in_order.b, share));
      }
    return !_mm512_cmp_ps_mask(wild, wild, _CMP_UNORD_Q);
  }
};

// What a sum through neighbours' zeros has made NaN, again by vectors.
template <int G, class T>
void one_by_one(const Head<G, T>& head, const T* from, T* to) {
  const Rooms rooms(head.call);
  for (int g = 0; g < G; g++) {
    Head<1, T> one(head.call, head.item, rooms);
    one.run(one, from + g * head.call.width, to + g * head.call.width);
  }
}

struct ByVectors {
  enum { AT_ONCE = 4 };  // queries, for which there are registers
  template <int G, class T>
  static void run(Head<G, T>& head, const T* from, T* to) { head.run(head, from, to); }
};

template <class By, int G, class T>
void run_some(int64_t count, const BitmapKV& call, int64_t item, const Rooms& rooms, const T* from, T* to) {
  if (count == G) {
    Head<G, T> head(call, item, rooms);
    By::run(head, from, to);
  } else if constexpr (G > 1) {
    run_some<By, G - 1>(count, call, item, rooms, from, to);
  }
}

// Items [begin, end), some queries of a head at once.
template <class T, class By>
void attend(const void* pointer, int64_t begin, int64_t end) {
  const BitmapKV& call = *static_cast<const BitmapKV*>(pointer);
  const Rooms rooms(call);
  for (int64_t item = begin; item < end; item++)
    for (int64_t member = 0; member < call.group; member += By::AT_ONCE) {
      const int64_t row = (item * call.group + member) * call.width, left = call.group - member;
      const T* const from = static_cast<const T*>(call.query) + row;
      T* const to = static_cast<T*>(call.out) + row;
      run_some<By, By::AT_ONCE>(left < By::AT_ONCE ? left : int64_t(By::AT_ONCE), call, item, rooms, from, to);
    }
}

}  // namespace
