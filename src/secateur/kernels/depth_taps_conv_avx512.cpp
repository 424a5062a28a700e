// Vectors of 16 floats.
#define LANES 16
#include "depth_taps_in_place.h"

extern "C" void depth_taps_conv_f32_avx512(const void* call, int64_t begin, int64_t end) {
  const Convolution& given = *static_cast<const Convolution*>(call);
  (given.y_row == given.out_width ? slide_in_place : slide)(call, begin, end);
}
