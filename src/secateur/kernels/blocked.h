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

// Columns that lie side by side, read as one: a processor loads two or three times at once, and x needs that.
template <class Column, int S>
struct Side {
  uint64_t all = 0;
  explicit Side(const Column* from) { __builtin_memcpy(&all, from, S * sizeof(Column)); }
  Column operator[](int s) const { return Column(all >> (s * 8 * sizeof(Column))); }
};

// What groups of N in bunches [begin, end) of a block add to the sums of a tile. `inputs[column]` is where V vectors of a
// column of the block lie; AS_ONE says whether columns are read as one. A function of its own: in one with all others registers are not given out well.
template <class T, class Column, int N, int V, class Inputs>
__attribute__((noinline)) void add_blocked(const KBlocked& weight, int64_t block, int64_t begin, int64_t end,
                                           const Inputs& inputs, const Tile& tile) {
  enum { A = abreast(N), S = at_once(N), R = together(N) };
  const int64_t bunches = weight.padded / A;
  const int32_t* group = weight.rows + block * weight.padded + begin * A;
  const int64_t* offsets = weight.offsets + block * bunches;
  const bool whole = tile.count == V * LANES;
  const int64_t rest = tile.count - (V - 1) * LANES;
  for (int64_t bunch = begin; bunch < end; bunch++, group += A) {
    const int64_t steps = offsets[bunch + 1] - offsets[bunch];
    if (!steps && !tile.bias && !tile.last) continue;
    // Outputs of some groups, or of a part of one.
    for (int part = 0; part < A * N; part += S * R) {
      const Column* columns = static_cast<const Column*>(weight.columns) + offsets[bunch] * A + part / N;
      const T* values = static_cast<const T*>(weight.values) + offsets[bunch] * A * N + part;
      Vector sum[S * R][V];
      float* at[S * R];
#pragma GCC unroll 8
      for (int i = 0; i < S * R; i++) {
        const int64_t output = int64_t(group[(part + i) / N]) * N + (part + i) % N;
        const bool real = output < tile.outputs;
        at[i] = real ? tile.sums + (output - tile.first) * tile.pitch : tile.spare;
        const float bias = tile.bias && real ? tile.bias[output] : 0;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          sum[i][v] = tile.bias              ? all(bias)
                      : whole || v < V - 1 ? load(at[i] + v * LANES)
                                             : load_some(at[i] + v * LANES, rest);
      }
      int64_t left = steps;
      if constexpr (N == 1 && S == 4) {  // an input that is loaded serves two outputs
        int64_t pairs = weight.shared ? weight.shared[block * bunches + bunch] : 0;
        for (left -= pairs; pairs > 0; pairs--, columns += A, values += A) {
          const Side<Column, S> side(columns);
#pragma GCC unroll 2
          for (int s = 0; s < S; s += 2) {
            const float* from = inputs[Inputs::AS_ONE ? side[s] : columns[s]];
#ifdef __x86_64__
            __asm__("" : "+r"(from));
#endif
            Vector x[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 2
            for (int i = s; i < s + 2; i++) {
              const Vector value = all(widen(values[i]));
#pragma GCC unroll 8
              for (int v = 0; v < V; v++) sum[i][v] += x[v] * value;
            }
          }
        }
      }
      for (; left > 0; left--, columns += A, values += A * N) {
        const Side<Column, S> side(columns);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
          const float* from = inputs[Inputs::AS_ONE ? side[s] : columns[s]];
#ifdef __x86_64__
          __asm__("" : "+r"(from));  // in a register: an instruction with an index is taken apart
#endif
          Vector x[V];
#pragma GCC unroll 8
          for (int v = 0; v < V && R > 1; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const Vector value = all(widen(values[s * N + r]));
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[s * R + r][v] += (R > 1 ? x[v] : load(from + v * LANES)) * value;
          }
        }
      }
      if (tile.last) {
        const Vector low = all(tile.low), high = all(tile.high);
#pragma GCC unroll 8
        for (int i = 0; i < S * R; i++)
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) {
            if (tile.more && at[i] != tile.spare) {
              const float* const more = tile.more + (at[i] - tile.sums) + v * LANES;
              sum[i][v] += whole || v < V - 1 ? load(more) : load_some(more, rest);
            }
            sum[i][v] = sum[i][v] < low ? low : sum[i][v];
            sum[i][v] = sum[i][v] > high ? high : sum[i][v];
          }
      }
#pragma GCC unroll 8
      for (int i = 0; i < S * R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          if (whole || v < V - 1)
            store(at[i] + v * LANES, sum[i][v]);
          else
            store_some(at[i] + v * LANES, sum[i][v], rest);
    }
  }
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
