// Sixteen numbers at a time.
#include "activate.h"
#include "wide.h"

namespace {

// e^x to two units in the last place: a power of two, and a polynomial within half of ln 2 of zero (Taylor's, which ends
// where a float does). Beyond what floats hold it is infinity, or zero, and of NaN it is NaN.
inline __m512 exponential(__m512 x) {
  const __m512 most = _mm512_set1_ps(130);  // x comes second: it is what is kept where one of both is NaN
  x = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, x));
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first of few digits
  rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
  const float factors[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
  __m512 sum = _mm512_set1_ps(1 / 5040.0f);
  for (const float factor : factors) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, power);
}

template <class T>
inline __m512 rounded(__m512 value, T) {
  return widen(narrow(value, T()), T());
}

inline __m512 rounded(__m512 value, float) { return value; }

template <class T>
void activate(const void* pointer, int64_t begin, int64_t end) {
  const Activate& call = *static_cast<const Activate*>(pointer);
  const int64_t behind = end * SPAN < call.count ? end * SPAN : call.count;
  const T *const x = static_cast<const T*>(call.x), *const times = static_cast<const T*>(call.times);
  T* const y = static_cast<T*>(call.y);
  const __m512 low = _mm512_set1_ps(call.low), high = _mm512_set1_ps(call.high), one = _mm512_set1_ps(1);
  for (int64_t i = begin * SPAN; i < behind; i += 16) {
    const __mmask16 lanes = first(behind - i);
    const __m512 some = load(x + i, lanes);
    __m512 found;
    if (call.kind == SILU)
      found = _mm512_div_ps(some, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), some))));
    else
      found = _mm512_min_ps(high, _mm512_max_ps(low, some));
    if (times) found = _mm512_mul_ps(rounded(found, T()), load(times + i, lanes));
    store(y + i, lanes, found);
  }
}

}  // namespace

extern "C" void activate_f32_avx512(const void* call, int64_t begin, int64_t end) { activate<float>(call, begin, end); }
extern "C" void activate_bf16_avx512(const void* call, int64_t begin, int64_t end) { activate<bf16>(call, begin, end); }
extern "C" void activate_f16_avx512(const void* call, int64_t begin, int64_t end) { activate<f16>(call, begin, end); }
