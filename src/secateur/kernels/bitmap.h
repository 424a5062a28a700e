// A bitmap: one bit for every weight, and the values of those that are kept.
//
// Sixteen outputs make a panel, its lanes. A panel is a sequence of steps of 64 bytes when dense: 16 lanes by `depth`
// consecutive inputs, where depth is 4 / sizeof(value), so 1, 2 or 4. Bit lane * depth + i of a step's mask says whether the
// weight of that lane and of input step * depth + i is kept; the kept values follow one another in the order of the
// bits. A step expands into one 512-bit register with one instruction, and sixteen steps are a tile of the matrix unit
// as they stand.
#pragma once
#include "kernels.h"

enum { LANES = 16 };

struct Bitmap {
  int64_t outputs, inputs;
  const uint8_t* masks;    // [panels, steps, 2 * depth] bytes, the first bit the lowest
  const void* values;      // [kept]
  const int64_t* offsets;  // [panels + 1]: where the values of a panel begin
};

// Whether nothing of some panels was left out: their values are steps as they lie, and no mask has to be looked at.
static inline bool whole(const Bitmap& weight, int depth, int panels, int64_t panel, int64_t apart) {
  bool found = weight.inputs % depth == 0;
  for (int p = 0; p < panels; p++, panel += apart)
    found = found && weight.offsets[panel + 1] - weight.offsets[panel] == LANES * weight.inputs;
  return found;
}

// Values of 8 bits, so a step is four inputs, and a scale for each output in the type of x.
struct BitmapInt8 {
  Bitmap bitmap;
  const void* scales;  // [outputs]
};
