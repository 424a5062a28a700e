#include "product_tiles.h"

extern "C" void product_bf16_avx512bf16(const void* call, int64_t begin, int64_t end) { multiply<bf16>(call, begin, end); }
