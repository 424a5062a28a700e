// Vectors of 16 floats.
#define LANES 16
#include "depth_taps_in_place.h"

extern "C" void depth_taps_conv_f32_avx512(const void* call, int64_t begin, int64_t end) {
  slide_either_way(call, begin, end);
}
