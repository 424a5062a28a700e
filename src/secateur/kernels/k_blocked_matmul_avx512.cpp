// Vectors of 16 floats.
#define LANES 16
#include "k_blocked_tiles.h"

extern "C" void k_blocked_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void k_blocked_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void k_blocked_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
