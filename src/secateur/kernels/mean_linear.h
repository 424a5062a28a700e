// The mean of every channel of a picture, and a product of the means with a dense weight: how networks of convolutions
// end. An item is a picture.
#pragma once
#include "kernels.h"

struct MeanLinear {
  const float* x;       // [pictures, channels, height, width]
  float* y;             // [pictures, outputs]
  const float* weight;  // [outputs, channels]
  const float* bias;    // [outputs], or null
  int64_t pictures, channels, height, width;
  int64_t row, plane;  // floats from one row of x to the next, and from one channel
  int64_t outputs;
};
