#define LANES 4
#include "mean_linear_sums.h"

extern "C" void mean_linear_f32_neon(const void* call, int64_t begin, int64_t end) { mean_linear(call, begin, end); }
