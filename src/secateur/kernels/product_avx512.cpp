#include "product_tiles.h"

extern "C" void product_f32_avx512(const void* call, int64_t begin, int64_t end) { multiply<float>(call, begin, end); }
