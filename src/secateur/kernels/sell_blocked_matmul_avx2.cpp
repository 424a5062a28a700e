#define LANES 8
#include "sell_blocked_gather.h"

extern "C" void sell_blocked_matmul_f32_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void sell_blocked_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void sell_blocked_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
