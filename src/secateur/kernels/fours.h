// What the variants do with weights that lie by fours (k_blocked.h), in vectors of LANES floats: one source for every
// processor. Four outputs over V vectors of pixels, or of rows of x, that are sixteen sums and more; outputs whose counts
// are alike follow one another, so that a processor foresees where a four ends.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "k_blocked.h"
#include "numbers.h"
#include "vectors.h"

namespace {

enum { MOST = LANES == 16 ? 4 : 2 };  // vectors of a tile: what registers hold of four outputs

// The sums of one tile, of outputs from `first` on: where they begin, wait between blocks, and go.
struct Sums4 {
  int64_t first;
  const float* bias;  // of all outputs, with which they begin, or null: they go on
  float* sums;        // from the first output, rows `pitch` from one another
  int64_t pitch;
  float* y;  // where they go from the last block, from the first output, or null: back to the sums
  int64_t y_pitch;
  int64_t outputs;    // that y has
  const float* more;  // added then, laid out as y, or null
  float low, high;    // and what they are held between
  int64_t count;      // pixels of the tile
};

// What a four is given of its tile in the end.
template <int V>
inline void finish(const Sums4& to, int64_t output, Vector (&sum)[V]) {
  if (output >= to.outputs) return;
  float* const y = to.y + (output - to.first) * to.y_pitch;
  const float* const more = to.more ? to.more + (output - to.first) * to.y_pitch : nullptr;
  const Vector low = all(to.low), high = all(to.high);
  const bool whole = to.count == V * LANES;
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const int64_t some = whole || v < V - 1 ? LANES : to.count - v * LANES;
    if (more) sum[v] += some == LANES ? load(more + v * LANES) : load_some(more + v * LANES, some);
    sum[v] = sum[v] < low ? low : sum[v];
    sum[v] = sum[v] > high ? high : sum[v];
    if (some == LANES)
      store(y + v * LANES, sum[v]);
    else
      store_some(y + v * LANES, sum[v], some);
  }
}

// What outputs of fours [begin, end) of a block add to the sums of a tile. `inputs[column]` is where V vectors of a column
// of the block lie.
template <class T, int V, class Inputs>
void add_fours(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const Inputs& inputs,
               const Sums4& to) {
  const int64_t fours = weight.padded / ABREAST;
  const int32_t* row = weight.rows + block * weight.padded + begin * ABREAST;
  const int64_t* offsets = weight.offsets + block * fours;
  const uint8_t* columns = weight.columns + offsets[begin] * ABREAST;
  const T* values = static_cast<const T*>(weight.values) + offsets[begin] * ABREAST;
  for (int64_t four = begin; four < end; four++, row += ABREAST) {
    int64_t steps = offsets[four + 1] - offsets[four];
    if (!steps && !to.bias && !to.y) continue;
    Vector sum[ABREAST][V];
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST; i++) {
      const float* const from = to.sums + (row[i] - to.first) * to.pitch;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] = to.bias ? all(to.bias[row[i]]) : load(from + v * LANES);
    }
    for (; steps > 0; steps--, columns += ABREAST, values += ABREAST)
#pragma GCC unroll 4
      for (int i = 0; i < ABREAST; i++) {
        const float* from = inputs[columns[i]];
        __asm__("" : "+r"(from));  // in a register: an instruction with an index is taken apart
        const Vector value = all(widen(values[i]));
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] += load(from + v * LANES) * value;
      }
    if (to.y) {
#pragma GCC unroll 4
      for (int i = 0; i < ABREAST; i++) finish<V>(to, row[i], sum[i]);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < ABREAST; i++) {
        float* const back = to.sums + (row[i] - to.first) * to.pitch;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(back + v * LANES, sum[i][v]);
      }
    }
  }
}

}  // namespace
