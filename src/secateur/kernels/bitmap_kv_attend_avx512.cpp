// By vectors, in every type.
#include "bitmap_kv_attend.h"

extern "C" void bitmap_kv_attend_f32_avx512(const void* call, int64_t begin, int64_t end) {
  attend<float, ByVectors>(call, begin, end);
}

extern "C" void bitmap_kv_attend_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  attend<bf16, ByVectors>(call, begin, end);
}

extern "C" void bitmap_kv_attend_f16_avx512(const void* call, int64_t begin, int64_t end) {
  attend<f16, ByVectors>(call, begin, end);
}
