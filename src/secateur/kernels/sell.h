// Sliced ELLPACK: the kept weights of sixteen outputs, side by side, each with the number of its input.
//
// A panel is sixteen outputs, its lanes, and as many steps as its fullest lane has weights; a step holds one weight of
// each lane. What fills up a lane is a zero for input 0.
//
// A weight that is not there is not multiplied, but zero times infinity is NaN in a dense product. So a row of x that
// holds something not finite is computed by a loop of its own, in sell_matmul.cpp, which the variants call.
#pragma once
#include "kernels.h"

enum { LANES = 16 };

struct Sell {
  int64_t outputs, inputs;
  const int16_t* columns;  // [steps, 16]
  const void* values;      // [steps, 16]
  const int64_t* offsets;  // [panels + 1]: the step at which a panel begins
};

// One panel for one row of x, whatever is in it.
extern "C" void sell_row_f32(const Matmul* call, int64_t panel, int64_t row);
extern "C" void sell_row_bf16(const Matmul* call, int64_t panel, int64_t row);
extern "C" void sell_row_f16(const Matmul* call, int64_t panel, int64_t row);
