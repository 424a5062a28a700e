// Vectors of 16 floats.
#define LANES 16
#include "group_cols_tiles.h"

extern "C" void group_cols_conv_f32_avx512(const void* call, int64_t begin, int64_t end) { convolve(call, begin, end); }

extern "C" void group_cols_places_f32_avx512(const void* call, int64_t begin, int64_t end) { place(call, begin, end); }

extern "C" void group_cols_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) {
  multiply(call, begin, end);
}
