// What the variants do with weights that lie in blocks of inputs (k_blocked.h), in vectors of LANES floats: one source for
// every processor. N outputs share their columns, or four single ones, or two pairs, go side by side, over V vectors of
// pixels or of rows of x: sixteen sums and more. Outputs whose counts are alike follow one another, so that a processor
// foresees where they end.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "k_blocked.h"
#include "numbers.h"
#include "vectors.h"

namespace {

// Groups of N outputs that lie side by side; how many of them, how many outputs of each, and how many vectors of a tile are
// computed together: what registers hold. With few of them one output over many vectors loads its weight least often.
constexpr int abreast(int n) { return n < ABREAST ? ABREAST / n : 1; }
#if LANES == 16
constexpr int at_once(int n) { return abreast(n); }
constexpr int together(int n) { return n > 8 ? 8 : n; }
constexpr int most(int n) { return n < 8 ? 4 : 3; }
#elif defined(__aarch64__)
constexpr int at_once(int) { return 1; }
constexpr int together(int n) { return n > 8 ? 8 : n; }
constexpr int most(int n) { return n < 4 ? 8 : n < 8 ? 6 : 3; }
#elif defined(__wasm__)
// Engines load all vectors of x before they multiply any, and have fifteen registers: seven of x, seven sums, a weight.
constexpr int at_once(int) { return 1; }
constexpr int together(int n) { return n > 4 ? 4 : n; }
constexpr int most(int n) { return n < 2 ? 7 : n < 4 ? 4 : 3; }
#else
constexpr int at_once(int) { return 1; }
constexpr int together(int n) { return n > 4 ? 4 : n; }
constexpr int most(int n) { return n < 2 ? 8 : n < 4 ? 4 : 3; }
#endif
enum { SPARE = 8 * LANES };  // floats of the widest tile

// The sums of one tile, of outputs from `first` on, each `pitch` floats from the one before it.
struct Tile {
  int64_t first, outputs;  // from one on, up to one
  float* sums;
  int64_t pitch, count;  // count: pixels of the tile
  const float* bias;     // of all outputs, with which sums begin, or null: they go on
  bool last;             // then what follows is done to them
  const float* more;     // added, laid out as the sums, or null
  float low, high;       // and what they are held between
  float* spare;          // where sums go of outputs that are none: V vectors
};

// A weight in all lanes.
template <class T>
inline Vector weight_of(const T* values, int i) {
  return all(widen(values[i]));
}

#if LANES == 16
// Of bfloat16 two come with one load: a value by itself would have to go through another register. Even ones begin a
// pair.
inline Vector weight_of(const bf16* values, int i) {
  typedef int32_t __attribute__((may_alias, aligned(2))) Pair;
  const Bits two = Bits(_mm512_set1_epi32(*reinterpret_cast<const Pair*>(values + i / 2 * 2)));
  return Vector(i % 2 ? two & 0xffff0000u : two << 16);
}
#endif

// The weights of a step, each in all lanes. Where they are loaded as one, as COUNT is four, more loads are left to x.
template <class T, int COUNT>
struct Weights {
  const T* values;
  explicit Weights(const T* from) : values(from) {}
  Vector operator[](int i) const { return weight_of(values, i); }
};

#if LANES == 16
template <>
struct Weights<float, 4> {
  __m512 four;
  explicit Weights(const float* from) : four(_mm512_broadcast_f32x4(_mm_loadu_ps(from))) {}
  Vector operator[](int i) const {
    switch (i) {
      case 0: return Vector(_mm512_permute_ps(four, 0x00));
      case 1: return Vector(_mm512_permute_ps(four, 0x55));
      case 2: return Vector(_mm512_permute_ps(four, 0xaa));
      default: return Vector(_mm512_permute_ps(four, 0xff));
    }
  }
};
#endif

// Columns that lie side by side, read as one: a processor loads two or three times at once, and x needs that.
template <class Column, int S>
struct Side {
  uint64_t all = 0;
  explicit Side(const Column* from) { __builtin_memcpy(&all, from, S * sizeof(Column)); }
  Column operator[](int s) const { return Column(all >> (s * 8 * sizeof(Column))); }
};

enum {
  FAR = 8,    // bunches ahead that memory is asked for
  SHORT = 45  // weights of an output in a bunch
};

template <class Any>
inline void ask_for(const Any* from, const Any* to) {
  const char* const end = reinterpret_cast<const char*>(to);
  for (const char* at = reinterpret_cast<const char*>(from); at < end; at += 64) __builtin_prefetch(at);
}

// What groups of N in bunches [begin, end) of a block add to the sums of a tile, G bunches at a time; where it came to.
// `inputs[column]` is where V vectors of a column of the block lie; AS_ONE says whether columns are read as one, and
// PLACED whether they are places of pixels. A function of its own: in one with all others registers are not given out well.
template <class T, class Column, int N, int V, int G, class Inputs>
__attribute__((noinline)) int64_t add_bunches(const KBlocked& weight, int64_t block, int64_t begin, int64_t end,
                                              const Inputs& inputs, const Tile& tile) {
  enum { A = abreast(N), S = at_once(N), R = together(N), EACH = S * R, TWO = each<T>() };
  static_assert(G == 1 || EACH == A * N, "bunches that go together go whole");
  static_assert(TWO == 1 || N == 1, "only single outputs have two weights in a step");
  const int64_t bunches = weight.padded / A;
  const int32_t* group = weight.rows + block * weight.padded + begin * A;
  const int64_t* offsets = weight.offsets + block * bunches;
  const bool whole = tile.count == V * LANES;
  const int64_t rest = tile.count - (V - 1) * LANES;
  // A step: an output, or the R of a group, for each of S columns, or TWO.
  const auto step = [&](const Column* columns, const T* values, Vector(&sum)[EACH][V]) __attribute__((always_inline)) {
    const Side<Column, S * TWO> side(columns);
    const Weights<T, (R == 1 ? S * TWO : 1)> weights(values);
#pragma GCC unroll 8
    for (int c = 0; c < S * TWO; c++) {
      const int s = c / TWO;
      const float* from = inputs[Inputs::AS_ONE ? side[c] : columns[c]];
#ifdef __x86_64__
      if (V > 1) __asm__("" : "+r"(from));  // in a register: of several instructions each with an index is taken apart
#endif
      Vector x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V && R > 1; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Vector value = weights[c * N + r];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[s * R + r][v] += (R > 1 ? x[v] : load(from + v * LANES)) * value;
      }
    }
  };
  // One in which an input that is loaded serves two outputs.
  const auto shared = [&](const Column* columns, const T* values, Vector(&sum)[EACH][V]) __attribute__((always_inline)) {
    const Side<Column, S * TWO> side(columns);
#pragma GCC unroll 4
    for (int c = 0; c < S / 2 * TWO; c++) {
      const int s = c / TWO * 2, i = c % TWO;  // the pair of outputs, and which of its columns
      const float* from = inputs[Inputs::AS_ONE ? side[s * TWO + i] : columns[s * TWO + i]];
#ifdef __x86_64__
      __asm__("" : "+r"(from));
#endif
      Vector x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 2
      for (int one = s; one < s + 2; one++) {
        const Vector value = weight_of(values, one * TWO + i);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[one][v] += x[v] * value;
      }
    }
  };
  int64_t bunch = begin;
  for (; bunch + G <= end; bunch += G, group += G * A) {
    int64_t left[G], all_of_them = 0;
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) all_of_them += left[g] = offsets[bunch + g + 1] - offsets[bunch + g];
    if (!all_of_them && !tile.bias && !tile.last) continue;
    if constexpr (G > 1) {  // two streams that overtake one another are not foreseen by the processor
      const int64_t from = least(bunch + FAR, end), to = least(bunch + FAR + G, end);
      const Column* const columns = static_cast<const Column*>(weight.columns);
      const T* const values = static_cast<const T*>(weight.values);
      ask_for(columns + offsets[from] * A * TWO, columns + offsets[to] * A * TWO);
      ask_for(values + offsets[from] * A * N * TWO, values + offsets[to] * A * N * TWO);
    }
    // Outputs of some groups, or of a part of one.
    for (int part = 0; part < A * N; part += EACH) {
      const Column* columns[G];
      const T* values[G];
      Vector sum[G][EACH][V];
      float* at[G * EACH];
#pragma GCC unroll 8
      for (int i = 0; i < G * EACH; i++) {
        if (i % EACH == 0) {
          const int64_t steps = offsets[bunch + i / EACH] * A;
          columns[i / EACH] = static_cast<const Column*>(weight.columns) + (steps + part / N) * TWO;
          values[i / EACH] = static_cast<const T*>(weight.values) + (steps * N + part) * TWO;
        }
        const int64_t output = int64_t(group[(part + i) / N]) * N + (part + i) % N;
        const bool real = output < tile.outputs;
        at[i] = real ? tile.sums + (output - tile.first) * tile.pitch : tile.spare;
        const float bias = tile.bias && real ? tile.bias[output] : 0;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          sum[i / EACH][i % EACH][v] = tile.bias              ? all(bias)
                                       : whole || v < V - 1 ? load(at[i] + v * LANES)
                                                              : load_some(at[i] + v * LANES, rest);
      }
      if constexpr (G > 1) {
        int64_t common = left[0];
#pragma GCC unroll 2
        for (int g = 1; g < G; g++) common = least(common, left[g]);
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) left[g] -= common;
        for (; common > 0; common--)
#pragma GCC unroll 2
          for (int g = 0; g < G; g++) {
            step(columns[g], values[g], sum[g]);
            columns[g] += A * TWO;
            values[g] += A * N * TWO;
          }
      } else if constexpr (N == 1 && S == 4) {
        int64_t pairs = weight.shared ? weight.shared[block * bunches + bunch] : 0;
        for (left[0] -= pairs; pairs > 0; pairs--, columns[0] += A * TWO, values[0] += A * TWO)
          shared(columns[0], values[0], sum[0]);
      }
#pragma GCC unroll 2
      for (int g = 0; g < G; g++)
        for (int64_t steps = left[g]; steps > 0; steps--, columns[g] += A * TWO, values[g] += A * N * TWO)
          step(columns[g], values[g], sum[g]);
      if (tile.last) {
        const Vector low = all(tile.low), high = all(tile.high);
#pragma GCC unroll 8
        for (int i = 0; i < G * EACH; i++)
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) {
            Vector& one = sum[i / EACH][i % EACH][v];
            if (tile.more && at[i] != tile.spare) {
              const float* const more = tile.more + (at[i] - tile.sums) + v * LANES;
              one += whole || v < V - 1 ? load(more) : load_some(more, rest);
            }
            one = one < low ? low : one;
            one = one > high ? high : one;
          }
      }
#pragma GCC unroll 8
      for (int i = 0; i < G * EACH; i++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          if (whole || v < V - 1)
            store(at[i] + v * LANES, sum[i / EACH][i % EACH][v]);
          else
            store_some(at[i] + v * LANES, sum[i / EACH][i % EACH][v], rest);
    }
  }
  return bunch;
}

// Where single sums are of one vector, and short, two bunches go together: a multiplication would wait for the one
// before it, and where steps end is foreseen more often. Long ones share more inputs than that gains, and for pixels
// it gains nothing.
template <class T, class Column, int N, int V, class Inputs>
void add_blocked(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const Inputs& inputs,
                 const Tile& tile) {
  if constexpr (V == 1 && N == 1 && at_once(N) == 4 && !Inputs::PLACED) {
    const int64_t* const offsets = weight.offsets + block * (weight.padded / abreast(N));
    if ((offsets[end] - offsets[begin]) * each<T>() < SHORT * (end - begin))
      begin = add_bunches<T, Column, N, V, 2>(weight, block, begin, end, inputs, tile);
  }
  add_bunches<T, Column, N, V, 1>(weight, block, begin, end, inputs, tile);
}

// With as many vectors as the pixels of the tile need.
template <class T, class Column, int N, int V, class Inputs>
void add_some(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const Inputs& inputs,
              const Tile& tile) {
  if constexpr (V > 1)
    if (tile.count <= (V - 1) * LANES) return add_some<T, Column, N, V - 1>(weight, block, begin, end, inputs, tile);
  add_blocked<T, Column, N, V>(weight, block, begin, end, inputs, tile);
}

}  // namespace
