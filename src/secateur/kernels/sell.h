// Sliced ELLPACK: the kept weights of sixteen outputs, side by side, each with the number of its input.
//
// A panel is sixteen outputs, its lanes, and as many steps as its fullest lane has weights; a step holds one weight of
// each lane. Outputs are sorted by how many weights they keep, so that lanes are about as full, and come in an order of
// their own; what is no output comes last. What fills up a lane is a zero for input 0. With columns of 16 bits that is the
// number of an input; with 8 bits it is how far the input lies behind that of the step before, in the same lane, the first
// behind input 0: a zero bridges what is further, and what fills up a lane stays where it is.
//
// A weight that is not there is not multiplied, but zero times infinity is NaN in a dense product. So a row of x that
// holds something not finite is computed by a loop of its own, in sell_matmul.cpp, which the variants call.
#pragma once
#include "kernels.h"
#include "numbers.h"

enum { LANES = 16 };

struct Sell {
  int64_t outputs, inputs;
  const void* columns;     // [steps, 16], int16_t or uint8_t
  const void* values;      // [steps, 16]
  const int64_t* offsets;  // [panels + 1]: the step at which a panel begins
  const int32_t* rows;     // [panels, 16]: the output of a lane
};

// The input that a lane has come to.
static inline int64_t moved(int64_t, int16_t column) { return column; }
static inline int64_t moved(int64_t input, uint8_t distance) { return input + distance; }

// The sums of a panel go to where its outputs are in a row of y, with their biases.
template <class T>
static inline void put(const float* sums, int64_t panel, const Matmul& call, const Sell& weight, int64_t row) {
  const int32_t* const rows = weight.rows + panel * LANES;
  const T* const bias = static_cast<const T*>(call.bias);
  T* const y = static_cast<T*>(call.y) + row * weight.outputs;
  for (int64_t lane = 0; lane < LANES && rows[lane] < weight.outputs; lane++)
    narrow(sums[lane] + (bias ? widen(bias[rows[lane]]) : 0.0f), y + rows[lane]);
}

// One panel for one row of x, whatever is in it.
#define SELL_ROW(bits)                                                                  \
  extern "C" void sell##bits##_row_f32(const Matmul* call, int64_t panel, int64_t row);  \
  extern "C" void sell##bits##_row_bf16(const Matmul* call, int64_t panel, int64_t row); \
  extern "C" void sell##bits##_row_f16(const Matmul* call, int64_t panel, int64_t row);
SELL_ROW(8)
SELL_ROW(16)
#undef SELL_ROW
