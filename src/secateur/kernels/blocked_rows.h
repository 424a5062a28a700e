// Products of rows of x with weights that lie in blocks of inputs (blocked.h). A lane is a row of x: of one block of inputs
// all rows are laid out as panels, input after input, and each bunch of groups adds to its sums what it keeps of it. Sums
// wait in the second cache between blocks, and are turned on their side in the end.
//
// A row of x that holds something not finite goes through the oracle.
#pragma once
#include "blocked.h"

namespace {

enum {
  ROWS = 256,     // of x that are gone through at once, unless a weight is light
  SUMS = 1 << 18, // floats that stay in the second cache
  LIGHT = 2,      // times as many numbers as x: fewer, and a weight is
  AHEAD = 64,     // inputs of a row that are asked for before they are read
  NEAR = 9216     // of a panel that stays in the first, where each input is loaded for one output
};

inline Vector widened(const float* from, int64_t count) { return count == LANES ? load(from) : load_some(from, count); }

template <class T>
Vector widened(const T* from, int64_t count) {
  Vector found = {};
  for (int64_t i = 0; i < count; i++) found[i] = widen(from[i]);
  return found;
}

inline Vector widened(const bf16* from, int64_t count) { return count == LANES ? load(from) : widened<bf16>(from, count); }

inline void narrowed(Vector from, float* to, int64_t count) {
  if (count == LANES)
    store(to, from);
  else
    store_some(to, from, count);
}

template <class T>
void narrowed(Vector from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to + i);
}

inline void narrowed(Vector from, bf16* to, int64_t count) {
  if (count == LANES)
    store(to, from);
  else
    narrowed<bf16>(from, to, count);
}

// Columns that lie `wide` floats apart.
struct Panel {
  enum { AS_ONE = 0, PLACED = 0 };  // to take one apart and to multiply it takes as long as to load four
  const float* from;
  int64_t wide;
  const float* operator[](int64_t column) const { return from + column * wide; }
};

// Columns of a vector each.
struct Narrow {
  enum { AS_ONE = 1, PLACED = 0 };
  const float* from;
  const float* operator[](int64_t column) const { return from + column * LANES; }
};

// Inputs of `count` rows, `wide` floats for each of them.
template <class T>
void lay_panel(const T* x, int64_t apart, int64_t count, int64_t inputs, float* panel, int64_t wide) {
  for (int64_t row = 0; row < count; row += LANES)
    for (int64_t input = 0; input < inputs; input += LANES) {
      const int64_t some = least(LANES, inputs - input);
      Vector rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const T* const from = x + (row + i) * apart + input;
        rows[i] = row + i < count ? widened(from, some) : Vector{};
        __builtin_prefetch(from + AHEAD);  // rows far apart are more streams than a processor follows
      }
      turn(rows);
      float* const to = panel + input * wide + row;
      for (int64_t i = 0; i < some; i++) store(to + i * wide, rows[i]);
    }
}

template <class T>
void take_sums(const float* sums, int64_t pitch, int64_t count, int64_t outputs, T* y, int64_t apart) {
  for (int64_t row = 0; row < count; row += LANES) {
    const int64_t left = least(LANES, count - row);
    for (int64_t output = 0; output < outputs; output += LANES) {
      const int64_t some = least(LANES, outputs - output);
      Vector lanes[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) lanes[i] = i < some ? load(sums + (output + i) * pitch + row) : Vector{};
      turn(lanes);
      T* const to = y + row * apart + output;
      for (int64_t i = 0; i < left; i++) narrowed(lanes[i], to + i * apart, some);
    }
  }
}

template <class T>
bool finite(const T* x, int64_t count) {
  uint32_t wild = 0;
  for (int64_t i = 0; i < count; i++) wild |= (bits_of_float(widen(x[i])) & 0x7f800000) == 0x7f800000;
  return !wild;
}

// How x lies in a panel, and what adds to sums what is kept of it: as floats.
template <class T, class Column, int N>
struct Floats {
  typedef float Number;

  // How many of some rows go together, and still leave room in the nearest cache.
  static int64_t wide(int64_t rows, int64_t depth) {
    int64_t wide = least(most(N) * LANES, (rows + LANES - 1) / LANES * LANES);
    while (N == 1 && wide > LANES && depth * wide > NEAR) wide -= LANES;
    return wide;
  }

  static void lay(const T* x, int64_t apart, int64_t count, int64_t inputs, float* panel, int64_t wide) {
    lay_panel(x, apart, count, inputs, panel, wide);
  }

  static void add(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const float* panel, int64_t wide,
                  const Tile& tile) {
    if (wide == LANES)
      add_blocked<T, Column, N, 1>(weight, block, begin, end, Narrow{panel}, tile);
    else
      add_some<T, Column, N, most(N)>(weight, block, begin, end, Panel{panel, wide}, tile);
  }
};

// Groups [begin, end) of N outputs, for rows that are finite or will be computed again; `own` are biases of the weight's, or
// null.
template <class T, class Column, int N, class X = Floats<T, Column, N>>
void multiply_blocked(const Matmul& call, const KBlocked& weight, int64_t begin, int64_t end, const float* own) {
  enum { A = abreast(N) };
  typedef typename X::Number Number;
  if (!call.rows) return;
  const int64_t wide = X::wide(call.rows, weight.depth);
  // Sums are of many rows and some outputs, so that a block of the weight is read once for the rows, or where the weight
  // keeps less than x has, of one panel and many outputs, so that the panel is laid out once for these.
  const int64_t blocks = (weight.inputs + weight.depth - 1) / weight.depth;
  const int64_t kept = weight.offsets[blocks * weight.padded / A] * A * N * each<T>();
  const bool panel_by_panel = kept < LIGHT * call.rows * weight.inputs || call.rows <= wide;
  const int64_t at_once = panel_by_panel ? wide : ROWS, most_outputs = SUMS / at_once;
  const int64_t stretch = most_outputs / (A * N) * A, last = least(end, weight.padded);
  const int64_t room = wide * weight.depth * sizeof(Number) / sizeof(float);
  float* const memory = static_cast<float*>(
      scratch((room + most_outputs * (at_once + LANES) + most_outputs + SPARE) * sizeof(float)));
  Number* const panel = reinterpret_cast<Number*>(memory);
  float *const sums = memory + room, *const biases = sums + most_outputs * (at_once + LANES);
  float* const spare = biases + most_outputs;
  const T* const bias = static_cast<const T*>(call.bias);
  for (int64_t first = 0; first < call.rows; first += at_once) {
    const int64_t count = least(at_once, call.rows - first);
    const int64_t pitch = count <= LANES ? LANES : (count + LANES - 1) / LANES * LANES + LANES;
    const T* const x = static_cast<const T*>(call.x) + first * weight.inputs;
    for (int64_t from = begin; from < last; from += stretch) {
      const int64_t until = least(last, from + stretch);
      const int64_t output = from * N, outputs = least(until * N, weight.outputs) - output;
      for (int64_t i = 0; i < outputs; i++) biases[i] = (bias ? widen(bias[output + i]) : 0) + (own ? own[output + i] : 0);
      Tile tile = {output, weight.outputs, sums, pitch, 0, biases - output, false, nullptr, 0, 0, spare};
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * weight.depth, deep = least(weight.depth, weight.inputs - start);
        for (int64_t row = 0; row < count; row += wide) {
          X::lay(x + row * weight.inputs + start, weight.inputs, least(wide, count - row), deep, panel, wide);
          tile.sums = sums + row;
          tile.count = least(wide, count - row);
          tile.count = (tile.count + LANES - 1) / LANES * LANES;  // there is room for whole vectors
          X::add(weight, block, from / A, (until + A - 1) / A, panel, wide, tile);
        }
        tile.bias = nullptr;
      }
      take_sums(sums, pitch, count, outputs, static_cast<T*>(call.y) + first * weight.outputs + output, weight.outputs);
    }
  }
}

}  // namespace
