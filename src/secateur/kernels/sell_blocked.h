// Blocked sliced ELLPACK: the kept weights of sixteen outputs, side by side, for 256 inputs at a time, so that a byte says
// which input a weight multiplies, and the inputs of a block are few enough to be looked up in registers.
//
// Outputs come in chunks of 256, the items. For each block of inputs those of a chunk are sorted by how many of its weights
// they keep, most first, and sixteen that follow one another are a panel, so that they are about as full. A step holds two
// weights of each output of a panel, next to one another. What fills up an output is a zero for the first input of the
// block. All blocks of a chunk follow one another, and all panels of a block: an item is read from end to end.
//
// A row of x that holds something not finite goes through the oracle, as in sell.h.
#pragma once
#include "kernels.h"
#include "numbers.h"

enum { PANEL = 16, DEPTH = 256, CHUNK = 256, STEP = 2 * PANEL };  // STEP: weights of a step

struct SellBlocked {
  int64_t outputs, inputs;
  const uint8_t* columns;  // [steps, 16, 2]: which input of its block
  const void* values;      // [steps, 16, 2]
  const uint8_t* rows;     // [panels * blocks, 16]: which output of its chunk
  const int64_t* offsets;  // [panels * blocks + 1]: the step at which a panel of a block begins
};

// Where a chunk begins and what it has.
struct Chunk {
  int64_t output, outputs;        // its first output, and how many it has
  int64_t panels, first, blocks;  // panels of a block, the first of all of them, and blocks of inputs

  Chunk(const SellBlocked& weight, int64_t chunk) {
    output = chunk * CHUNK;
    outputs = weight.outputs - output < CHUNK ? weight.outputs - output : CHUNK;
    panels = (outputs + PANEL - 1) / PANEL;
    blocks = (weight.inputs + DEPTH - 1) / DEPTH;
    first = chunk * (CHUNK / PANEL) * blocks;
  }
};

// Sums of a chunk go to a row of y, with their biases.
template <class T>
static inline void put(const float* sums, const Chunk& chunk, const Matmul& call, int64_t row, int64_t all) {
  const T* const bias = static_cast<const T*>(call.bias) + (call.bias ? chunk.output : 0);
  T* const y = static_cast<T*>(call.y) + row * all + chunk.output;
  for (int64_t i = 0; i < chunk.outputs; i++) narrow(sums[i] + (call.bias ? widen(bias[i]) : 0.0f), y + i);
}

// One chunk for one row of x, whatever is in it.
extern "C" void sell_blocked_row_f32(const Matmul* call, int64_t chunk, int64_t row);
extern "C" void sell_blocked_row_bf16(const Matmul* call, int64_t chunk, int64_t row);
extern "C" void sell_blocked_row_f16(const Matmul* call, int64_t chunk, int64_t row);

// The same by the type of x.
static inline void sell_blocked_row(const Matmul& call, int64_t chunk, int64_t row, float) {
  sell_blocked_row_f32(&call, chunk, row);
}
static inline void sell_blocked_row(const Matmul& call, int64_t chunk, int64_t row, bf16) {
  sell_blocked_row_bf16(&call, chunk, row);
}
static inline void sell_blocked_row(const Matmul& call, int64_t chunk, int64_t row, f16) {
  sell_blocked_row_f16(&call, chunk, row);
}
