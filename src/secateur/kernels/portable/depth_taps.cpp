// The part of convolutions.cpp that has names of its own.
#define LANES 4
#include "../depth_taps_conv.cpp"
#include "../depth_taps_rows.h"

extern "C" void depth_taps_conv_f32_vectors(const void* call, int64_t begin, int64_t end) { slide(call, begin, end); }
