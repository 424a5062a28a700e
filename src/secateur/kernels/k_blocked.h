// Single weights for products with many rows: inputs in blocks whose share of x, laid out with a row of x in each lane,
// stays in the nearest cache; and in each block four outputs that keep about as many weights go side by side.
//
// Outputs are sorted within a chunk of 256 by how many weights of a block they keep, most first, and taken by fours. A
// step holds a weight of each of the four, or two in bfloat16; what fills up an output is a zero for the first input of the
// block.
//
// A row of x that holds something not finite goes through the oracle, as in sell.h.
//
// Groups of outputs that share their columns lie likewise (group_cols.h), as many side by side as make four outputs, or
// one: then `padded` and `rows` are of groups, and a step has a column for each and a value for each output.
#pragma once
#include "kernels.h"
#include "numbers.h"

enum { ABREAST = 4, CHUNK = 256 };  // outputs side by side, and outputs that are sorted together: an item

// Weights of an output in a step: of bfloat16 two are multiplied and added as one.
template <class T>
constexpr int each() {
  return 1;
}
template <>
constexpr int each<bf16>() {
  return 2;
}

struct KBlocked {
  int64_t outputs, inputs, depth;  // depth: inputs in a block
  int64_t padded;                  // outputs, rounded up to a multiple of four
  const void* columns;             // [steps, 4, each], uint8_t: which input of its block
  const void* values;              // [steps, 4, each]
  const int32_t* rows;             // [blocks, padded]: the outputs in the order of a block
  const int64_t* offsets;          // [blocks * padded / 4 + 1]: the step at which a four begins
  // [blocks * padded / 4]: with how many steps it begins in which the first two outputs have the same columns, and the last two;
  // or null.
  const int32_t* shared;
};

// One chunk for one row of x, whatever is in it.
extern "C" void k_blocked_row_f32(const Matmul* call, int64_t chunk, int64_t row);
extern "C" void k_blocked_row_bf16(const Matmul* call, int64_t chunk, int64_t row);
extern "C" void k_blocked_row_f16(const Matmul* call, int64_t chunk, int64_t row);
