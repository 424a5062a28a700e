// Two weights of an output and the two inputs they meet are multiplied and added by one instruction. Inputs lie in panels
// of bfloat16, half of what floats take, and which two meet is found out step by step: their vectors are interleaved there.
#define LANES 16
#include "k_blocked_tiles.h"

namespace {

typedef __m512bh Pairs;
typedef int32_t __attribute__((may_alias, aligned(2))) Two;

enum {
  LANES_OF_TWO = 2 * LANES,
  SOON = 512  // columns ahead that memory is asked for
};

// Where lanes of two vectors of 16 bfloat16 come from to stand in pairs.
inline __m512i one_of_each() {
  return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                          34, 2, 33, 1, 32, 0);
}

// The inputs of two columns, for V vectors of rows.
template <int V>
struct Met {
  Pairs pairs[V];

  Met(const bf16* first, const bf16* second, __m512i) {
    static_assert(V % 2 == 0, "rows go by 32");
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) {
      const __m512i one = _mm512_load_si512(first + v * LANES), other = _mm512_load_si512(second + v * LANES);
      pairs[v] = Pairs(_mm512_unpacklo_epi16(one, other));
      pairs[v + 1] = Pairs(_mm512_unpackhi_epi16(one, other));
    }
  }
};

template <>
struct Met<1> {
  Pairs pairs[1];

  Met(const bf16* first, const bf16* second, __m512i turn) {
    const __m512i one = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i other = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(second)));
    pairs[0] = Pairs(_mm512_permutex2var_epi16(one, turn, other));
  }
};

// What bunches [begin, end) of a block add to the sums of a tile, for V vectors of rows. With FOURS the weights of a step are
// one load (`moves_lanes`), and an output has two sums: with less to load, an instruction would wait for the sum it adds to.
template <int V, bool FOURS = false>
void add_pairs(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const bf16* panel, const Tile& tile) {
  enum { WIDE = V * LANES, STEP = ABREAST * 2 };
  const int64_t bunches = weight.padded / ABREAST;
  const int64_t* const offsets = weight.offsets + block * bunches;
  const int32_t* const shared = weight.shared + block * bunches;
  const int32_t* rows = weight.rows + block * weight.padded + begin * ABREAST;
  const uint8_t* columns = static_cast<const uint8_t*>(weight.columns) + offsets[begin] * STEP;
  const bf16* values = static_cast<const bf16*>(weight.values) + offsets[begin] * STEP;
  const __m512i turn = one_of_each();
  // What column `i` of a step has. They are loaded as one: a processor loads three times at once, and x needs that.
  const auto of = [&](uint64_t all, int i) __attribute__((always_inline)) {
    const int to = (8 * i + 64 - __builtin_ctz(WIDE * 2)) % 64;
    const uint64_t there = (all >> to | all << (64 - to) % 64) & (0xff * WIDE * 2);
    return reinterpret_cast<const bf16*>(reinterpret_cast<const char*>(panel) + there);
  };
  const auto met = [&](uint64_t all, int i) __attribute__((always_inline)) {
    return Met<V>(of(all, 2 * i), of(all, 2 * i + 1), turn);
  };
  // Two weights times x, added to the sums of their output.
  const auto add = [&](int i, const Met<V>& x, __m512(&sum)[V]) __attribute__((always_inline)) {
    const Two* const two = reinterpret_cast<const Two*>(values + 2 * i);
    if constexpr (FOURS) {
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
      const __m512i both = i == 0   ? _mm512_shuffle_epi32(four, _MM_PERM_AAAA)
                           : i == 1 ? _mm512_shuffle_epi32(four, _MM_PERM_BBBB)
                           : i == 2 ? _mm512_shuffle_epi32(four, _MM_PERM_CCCC)
                                    : _mm512_shuffle_epi32(four, _MM_PERM_DDDD);
      sum[0] = _mm512_dpbf16_ps(sum[0], x.pairs[0], Pairs(both));
    } else if constexpr (V == 1) {  // compilers load them by an instruction of its own
      __m512 found = sum[0];
      __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(found) : "v"(x.pairs[0]), "m"(*two));
      sum[0] = found;
    } else {
      const Pairs both = Pairs(_mm512_set1_epi32(*two));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[v] = _mm512_dpbf16_ps(sum[v], x.pairs[v], both);
    }
  };
  for (int64_t bunch = begin; bunch < end; bunch++, rows += ABREAST) {
    int64_t left = offsets[bunch + 1] - offsets[bunch], together = shared[bunch];
    if (!left && !tile.bias) continue;
    left -= together;
    float* at[ABREAST];
    __m512 sum[ABREAST][V];
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST; i++) {
      const int64_t output = rows[i];
      const bool real = output < tile.outputs;
      at[i] = real ? tile.sums + (output - tile.first) * tile.pitch : tile.spare;
      const float bias = tile.bias && real ? tile.bias[output] : 0;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] = tile.bias ? _mm512_set1_ps(bias) : _mm512_loadu_ps(at[i] + v * LANES);
    }
    const auto shared_step = [&](__m512(&to)[ABREAST][V]) __attribute__((always_inline)) {
      const uint64_t all = Side<uint8_t, STEP>(columns).all;
#pragma GCC unroll 2
      for (int i = 0; i < ABREAST; i += 2) {
        const Met<V> x = met(all, i);
#pragma GCC unroll 2
        for (int one = i; one < i + 2; one++) add(one, x, to[one]);
      }
      columns += STEP;
      values += STEP;
    };
    const auto step = [&](__m512(&to)[ABREAST][V]) __attribute__((always_inline)) {
      const uint64_t all = Side<uint8_t, STEP>(columns).all;
#pragma GCC unroll 4
      for (int i = 0; i < ABREAST; i++) add(i, met(all, i), to[i]);
      columns += STEP;
      values += STEP;
    };
    if constexpr (V == 1) {
      // By fours: how often a few of these follow one another is foreseen, as it is about the same for the bunch before.
      const auto ask = [&]() __attribute__((always_inline)) {
        __builtin_prefetch(reinterpret_cast<const char*>(values) + 2 * SOON);
        __builtin_prefetch(columns + SOON);
      };
      left += together % 4;
      __m512 more[ABREAST][V] = {};  // an instruction waits six cycles for the sum it adds to
      __m512(&other)[ABREAST][V] = FOURS ? more : sum;
      const bool two_sums = FOURS || together >= 4;
      if (together >= 4)
        for (together /= 4; together > 0; together--) {
          ask();
          shared_step(sum);
          shared_step(more);
          shared_step(sum);
          shared_step(more);
        }
      for (; left >= 4; left -= 4) {
        ask();
        step(sum);
        step(other);
        step(sum);
        step(other);
      }
      if (left & 2) {
        step(sum);
        step(other);
      }
      if (left & 1) step(sum);
      if (two_sums)
#pragma GCC unroll 4
        for (int i = 0; i < ABREAST; i++) sum[i][0] = _mm512_add_ps(sum[i][0], more[i][0]);
    } else {
      for (; together > 0; together--) shared_step(sum);
      for (; left > 0; left--) step(sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) _mm512_storeu_ps(at[i] + v * LANES, sum[i][v]);
  }
}

struct InPairs {
  typedef bf16 Number;

  // Of the last rows fewer go together, in a panel as narrow.
  static int64_t wide(int64_t rows, int64_t = 0) { return rows <= LANES ? LANES : rows <= 2 * LANES ? 2 * LANES : 4 * LANES; }

  // 16 rows lie beside one another as they are; 32 so that what interleaves the quarters of a vector leaves them in order.
  static void lay(const bf16* x, int64_t apart, int64_t count, int64_t inputs, bf16* panel, int64_t) {
    const int64_t wide = InPairs::wide(count), vectors = wide == LANES ? 1 : 2;
    for (int64_t row = 0; row < wide; row += vectors * LANES)
      for (int64_t input = 0; input < inputs; input += LANES_OF_TWO) {
        const int64_t some = least(LANES_OF_TWO, inputs - input);
        const __mmask32 there = uint32_t((uint64_t(1) << some) - 1);
        Vector rows[2][LANES];
        for (int64_t half = 0; half < vectors; half++) {
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) {
            const int64_t of = row + half * LANES + i;
            const bf16* const from = x + of * apart + input;
            rows[half][i] = of < count ? Vector(_mm512_maskz_loadu_epi16(there, from)) : Vector{};
            __builtin_prefetch(from + AHEAD);
          }
          turn(rows[half]);
        }
        bf16* const to = panel + input * wide + row;
        for (int64_t i = 0; i < some; i++) {
          const int64_t odd = i % 2;
          const __m512i low = __m512i(rows[0][i / 2]);
          if (vectors == 1) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i * wide),
                               _mm512_cvtepi32_epi16(odd ? _mm512_srli_epi32(low, 16) : low));
          } else {
            // Of each quarter of a vector four rows of the first sixteen, then four of the others.
            const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 30, 28, 26, 24, 54, 52, 50, 48, 22, 20, 18, 16, 46, 44, 42,
                                                  40, 14, 12, 10, 8, 38, 36, 34, 32, 6, 4, 2, 0);
            const __m512i lanes = odd ? _mm512_add_epi16(even, _mm512_set1_epi16(1)) : even;
            _mm512_store_si512(to + i * wide, _mm512_permutex2var_epi16(low, lanes, __m512i(rows[1][i / 2])));
          }
        }
      }
  }

  static void add(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const bf16* panel, int64_t,
                  const Tile& tile) {
    switch (wide(tile.count) / LANES) {
      case 1:
        if (moves_lanes())
          add_pairs<1, true>(weight, block, begin, end, panel, tile);
        else
          add_pairs<1>(weight, block, begin, end, panel, tile);
        break;
      case 2: add_pairs<2>(weight, block, begin, end, panel, tile); break;
      default: add_pairs<4>(weight, block, begin, end, panel, tile);
    }
  }
};

}  // namespace

extern "C" void k_blocked_matmul_bf16_avx512bf16(const void* call, int64_t begin, int64_t end) {
  matmul<bf16, InPairs>(call, begin, end);
}
