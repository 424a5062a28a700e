// As many parts side by side as kernels read.
#include <immintrin.h>

#include "memory.h"
#include "streams.h"

namespace {

enum { PAGE = 4096, AHEAD = 2048 };

inline __m256i four(const char* from) {
  const __m256i* const at = reinterpret_cast<const __m256i*>(from);
  return _mm256_or_si256(_mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)),
                         _mm256_or_si256(_mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3)));
}

}  // namespace

extern "C" void memory_read_avx2(const void* pointer, int64_t begin, int64_t end) {
  const Memory& memory = *static_cast<const Memory*>(pointer);
  const char* const data = static_cast<const char*>(memory.data) + begin * PAGE;
  const int64_t bytes = (end * PAGE < memory.bytes ? end * PAGE : memory.bytes) - begin * PAGE;
  const int64_t apart = bytes / STREAMS / 128 * 128;
  const bool asks = asks_ahead();
  __m256i any[STREAMS] = {};
  for (int64_t at = 0; at < apart; at += 128)
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++) {
      const char* const from = data + s * apart + at;
      if (asks) {
        _mm_prefetch(from + AHEAD, _MM_HINT_T0);
        _mm_prefetch(from + AHEAD + 64, _MM_HINT_T0);
      }
      any[s] = _mm256_or_si256(any[s], four(from));
    }
  for (int64_t at = STREAMS * apart; at + 128 <= bytes; at += 128) any[0] = _mm256_or_si256(any[0], four(data + at));
  const __m256i all = _mm256_or_si256(_mm256_or_si256(any[0], any[1]), _mm256_or_si256(any[2], any[3]));
  __asm__ volatile("" : : "r"(_mm256_testz_si256(all, all)));  // or the compiler would not read at all
}
