// A step of a bitmap is one expand instruction; its sixteen lanes are multiplied with one input, held in all of them,
// and added to the sums of the lanes, so nothing is ever added across a register. The values are read once, in order,
// ahead of their use. A step takes at least three cycles (the mask to a mask register, and the two halves of expand),
// in which one core reads less than it holds up to about 70 % sparsity: until there the memory is the limit.
#include "bitmap.h"
#include "wide.h"

namespace {

enum { AHEAD = 2048 };  // bytes: far enough for memory, near enough to stay in the first cache

template <class T>
inline void prefetch(const T* values) {
  _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD + 64, _MM_HINT_T0);
}

// The sums of sixteen outputs for N rows of x, float values: one step is one input.
template <int N>
void sums(const uint16_t* masks, const float* values, int64_t inputs, const float* x, int64_t stride, __m512* sum) {
  __m512 even[N], odd[N];  // two chains, or each step would wait for the one before
  for (int n = 0; n < N; n++) even[n] = odd[n] = _mm512_setzero_ps();
  int64_t step = 0;
  for (; step + 2 <= inputs; step += 2) {
    prefetch(values);
    const __m512 first = _mm512_maskz_expandloadu_ps(masks[step], values);
    values += __builtin_popcount(masks[step]);
    const __m512 second = _mm512_maskz_expandloadu_ps(masks[step + 1], values);
    values += __builtin_popcount(masks[step + 1]);
    for (int n = 0; n < N; n++) {
      even[n] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[n * stride + step]), even[n]);
      odd[n] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[n * stride + step + 1]), odd[n]);
    }
  }
  if (step < inputs) {
    const __m512 last = _mm512_maskz_expandloadu_ps(masks[step], values);
    for (int n = 0; n < N; n++) even[n] = _mm512_fmadd_ps(last, _mm512_set1_ps(x[n * stride + step]), even[n]);
  }
  for (int n = 0; n < N; n++) sum[n] = _mm512_add_ps(even[n], odd[n]);
}

// The two inputs of each lane of a step of 16-bit values.
inline __m512 lower(__m512i step, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(step, 16)); }

inline __m512 upper(__m512i step, bf16) {
  return _mm512_castsi512_ps(_mm512_and_si512(step, _mm512_set1_epi32(0xffff0000)));
}

inline __m512 lower(__m512i step, f16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(step)); }

inline __m512 upper(__m512i step, f16) { return lower(_mm512_srli_epi32(step, 16), f16()); }

// The same for 16-bit values, with x widened to floats beforehand: one step is two inputs.
template <int N, class T>
void sums(const uint32_t* masks, const T* values, int64_t inputs, const float* x, int64_t stride, __m512* sum) {
  __m512 even[N], odd[N];
  for (int n = 0; n < N; n++) even[n] = odd[n] = _mm512_setzero_ps();
  const int64_t steps = (inputs + 1) / 2;  // x holds a zero where the last step has no second input
  for (int64_t step = 0; step < steps; step++) {
    if (step % 2 == 0) prefetch(values);
    const __m512i both = _mm512_maskz_expandloadu_epi16(masks[step], values);
    values += __builtin_popcount(masks[step]);
    const __m512 first = lower(both, T()), second = upper(both, T());
    for (int n = 0; n < N; n++) {
      even[n] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[n * stride + 2 * step]), even[n]);
      odd[n] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[n * stride + 2 * step + 1]), odd[n]);
    }
  }
  for (int n = 0; n < N; n++) sum[n] = _mm512_add_ps(even[n], odd[n]);
}

template <class T>
struct Mask;
template <>
struct Mask<float> {
  typedef uint16_t Word;
};
template <>
struct Mask<bf16> {
  typedef uint32_t Word;
};
template <>
struct Mask<f16> {
  typedef uint32_t Word;
};

template <int N, class T>
void rows(const Matmul& call, const Bitmap& weight, int64_t panel, int64_t row, const float* x, int64_t stride) {
  typedef typename Mask<T>::Word Word;
  const int64_t depth = sizeof(Word) / 2, steps = (weight.inputs + depth - 1) / depth;
  const T* values = static_cast<const T*>(weight.values) + weight.offsets[panel];
  __m512 sum[N];
  sums<N>(reinterpret_cast<const Word*>(weight.masks) + panel * steps, values, weight.inputs, x + row * stride, stride, sum);
  const int64_t at = panel * LANES;
  const __mmask16 lanes = first(weight.outputs - at);
  const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
  for (int n = 0; n < N; n++)
    store(static_cast<T*>(call.y) + (row + n) * weight.outputs + at, lanes, _mm512_add_ps(sum[n], bias));
}

// Eight rows of x at a time share what is expanded; what is left goes in fours, twos and one.
template <class T>
void panels(const Matmul& call, const float* x, int64_t stride, int64_t begin, int64_t end) {
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  for (int64_t panel = begin; panel < end; panel++) {
    int64_t row = 0;
    for (; row + 8 <= call.rows; row += 8) rows<8, T>(call, weight, panel, row, x, stride);
    if (call.rows - row >= 4) rows<4, T>(call, weight, panel, row, x, stride), row += 4;
    if (call.rows - row >= 2) rows<2, T>(call, weight, panel, row, x, stride), row += 2;
    if (call.rows - row >= 1) rows<1, T>(call, weight, panel, row, x, stride);
  }
}

template <class T>
void widened(const Matmul& call, int64_t begin, int64_t end) {
  const int64_t inputs = static_cast<const Bitmap*>(call.weight)->inputs, stride = (inputs + 15) / 16 * 16;
  float* const x = static_cast<float*>(scratch(call.rows * stride * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++)
    for (int64_t input = 0; input < inputs; input += 16)
      _mm512_store_ps(x + row * stride + input,
                      load(static_cast<const T*>(call.x) + row * inputs + input, first(inputs - input)));
  panels<T>(call, x, stride, begin, end);
}

}  // namespace

extern "C" void bitmap_matmul_f32_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  panels<float>(call, static_cast<const float*>(call.x), static_cast<const Bitmap*>(call.weight)->inputs, begin, end);
}

extern "C" void bitmap_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  widened<bf16>(*static_cast<const Matmul*>(call), begin, end);
}

extern "C" void bitmap_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  widened<f16>(*static_cast<const Matmul*>(call), begin, end);
}
