// Blocks of rows x columns weights, each stored whole, an input after the other, with the number of its first input.
//
// As with sell.h, a row of x that holds something not finite goes through the oracle.
#pragma once
#include "kernels.h"

struct Block {
  int64_t outputs, inputs, rows, columns;
  const int32_t* places;   // [blocks]: the first input over the columns
  const void* values;      // [blocks, columns, rows]
  const int64_t* offsets;  // [outputs / rows + 1]: where the blocks of a row of blocks begin
};

// One row of blocks for one row of x, whatever is in it.
extern "C" void block_row_f32(const Matmul* call, int64_t item, int64_t row);
extern "C" void block_row_bf16(const Matmul* call, int64_t item, int64_t row);
extern "C" void block_row_f16(const Matmul* call, int64_t item, int64_t row);

namespace {  // each file keeps the copy compiled with its own flags

// A row of blocks of R outputs as variants read it; a step is a block.
template <int R, class T>
struct BlockRow {
  const T* values;
  const int32_t* places;
  int64_t left;

  void begin(int64_t item, const Matmul&, const Block& weight, int64_t, const float*) {
    const int64_t block = weight.offsets[item];
    values = static_cast<const T*>(weight.values) + block * weight.columns * R;
    places = weight.places + block;
    left = weight.offsets[item + 1] - block;
  }
};

}  // namespace
