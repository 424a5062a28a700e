// Depthwise convolutions, in which a channel has a kernel of its own, of which some taps are kept: for each channel its
// bias and the taps it keeps, and which of a table of shapes says where those are.
#pragma once
#include "convolution.h"

struct DepthTaps {
  int64_t channels, taps;
  const float* values;    // of each channel its bias, then its taps, along the rows of the kernel
  const int64_t* shapes;  // a bit for every tap that a shape keeps, the first one lowest
  const int16_t* which;   // [channels]: the shape of each
  const int64_t* begins;  // [channels]: where its values begin
};

static inline const DepthTaps* depth_taps_of(const Convolution* call) {
  return static_cast<const DepthTaps*>(call->weight);
}

// One item, some rows of some channels, whatever is in the inputs.
extern "C" void depth_taps_item_f32(const Convolution* call, int64_t item);
