// A step of a bitmap is one expand instruction; its sixteen lanes are multiplied with one input, held in all of them,
// and added to the sums of the lanes, so nothing is ever added across a register. The values are read once, in order,
// ahead of their use. A step takes at least three cycles (the mask to a mask register, and the two halves of expand),
// in which one core reads less than it holds up to about 70 % sparsity: until there the memory is the limit.
#include "bitmap.h"
#include "streams.h"
#include "wide.h"

namespace {

// Bytes: far enough for memory, near enough to stay in the first cache.
enum { AHEAD = 2048, MASKS_AHEAD = 1024 };

template <class T, class Word>
inline void prefetch(const T* values, const Word* masks) {
  _mm_prefetch(reinterpret_cast<const char*>(masks) + MASKS_AHEAD, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD + 64, _MM_HINT_T0);
}

// One step of a panel, float values: one input. Values are taken by reference, and stay in registers when inlined.
template <int N, int CHAINS>
inline void add(uint16_t mask, const float*& values, const float* x, int64_t stride, __m512 (&sum)[2][N], int chain) {
  const __m512 weights = _mm512_maskz_expandloadu_ps(mask, values);
  values += __builtin_popcount(mask);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
    sum[chain % CHAINS][n] = _mm512_fmadd_ps(weights, _mm512_set1_ps(x[n * stride]), sum[chain % CHAINS][n]);
}

// The two inputs of each lane of a step of 16-bit values.
inline __m512 lower(__m512i step, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(step, 16)); }

inline __m512 upper(__m512i step, bf16) {
  return _mm512_castsi512_ps(_mm512_and_si512(step, _mm512_set1_epi32(0xffff0000)));
}

inline __m512 lower(__m512i step, f16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(step)); }

inline __m512 upper(__m512i step, f16) { return lower(_mm512_srli_epi32(step, 16), f16()); }

// The same for 16-bit values, with x widened to floats beforehand: one step is two inputs, the second of which is zero
// in x where there is none.
template <int N, int CHAINS, class T>
inline void add(uint32_t mask, const T*& values, const float* x, int64_t stride, __m512 (&sum)[2][N], int) {
  const __m512i both = _mm512_maskz_expandloadu_epi16(mask, values);
  values += __builtin_popcount(mask);
  const __m512 first = lower(both, T()), second = upper(both, T());
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    sum[0][n] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[n * stride]), sum[0][n]);
    sum[CHAINS - 1][n] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[n * stride + 1]), sum[CHAINS - 1][n]);
  }
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

// N rows of x times some panels at once, `apart` from one to the next; of few rows a panel has two sums in turn.
template <int PANELS, int N, class T>
void rows(const Matmul& call, const Bitmap& weight, int64_t panel, int64_t apart, int64_t row, const float* x,
          int64_t stride) {
  enum { CHAINS = N <= 2 && PANELS <= 2 ? 2 : 1 };
  typedef typename Mask<T>::Word Word;
  const int64_t depth = sizeof(Word) / 2, steps = (weight.inputs + depth - 1) / depth, next = apart * steps;
  const Word* masks = reinterpret_cast<const Word*>(weight.masks) + panel * steps;
  const T* values[PANELS];
  __m512 sum[PANELS][2][N];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; p++) {
    values[p] = static_cast<const T*>(weight.values) + weight.offsets[panel + p * apart];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[p][0][n] = sum[p][1][n] = _mm512_setzero_ps();
  }
  x += row * stride;
  int64_t step = 0;
  for (; step + 2 <= steps; step += 2, x += 2 * depth, masks += 2)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
      prefetch(values[p], masks + p * next);
      add<N, CHAINS>(masks[p * next], values[p], x, stride, sum[p], 0);
      add<N, CHAINS>(masks[p * next + 1], values[p], x + depth, stride, sum[p], 1);
    }
  if (step < steps)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) add<N, CHAINS>(masks[p * next], values[p], x, stride, sum[p], 0);
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; p++) {
    const int64_t at = (panel + p * apart) * LANES;
    const __mmask16 lanes = first(weight.outputs - at);
    const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const __m512 all = CHAINS == 2 ? _mm512_add_ps(sum[p][0][n], sum[p][1][n]) : sum[p][0][n];
      store(static_cast<T*>(call.y) + (row + n) * weight.outputs + at, lanes, _mm512_add_ps(all, bias));
    }
  }
}

// Eight rows of x at a time share what is expanded; what is left goes in fours, twos and one.
template <int PANELS, class T>
void all_rows(const Matmul& call, const Bitmap& weight, int64_t panel, int64_t apart, const float* x, int64_t stride) {
  int64_t row = 0;
  for (; row + 8 <= call.rows; row += 8) rows<PANELS, 8, T>(call, weight, panel, apart, row, x, stride);
  if (call.rows - row >= 4) rows<PANELS, 4, T>(call, weight, panel, apart, row, x, stride), row += 4;
  if (call.rows - row >= 2) rows<PANELS, 2, T>(call, weight, panel, apart, row, x, stride), row += 2;
  if (call.rows - row >= 1) rows<PANELS, 1, T>(call, weight, panel, apart, row, x, stride);
}

template <class T>
void panels(const Matmul& call, const float* x, int64_t stride, int64_t begin, int64_t end) {
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  if (call.rows == 1)
    begin = abreast<STREAMS>(begin, end, [&](int64_t panel, int64_t apart) {
      rows<STREAMS, 1, T>(call, weight, panel, apart, 0, x, stride);
    });
  begin = abreast<2>(begin, end, [&](int64_t panel, int64_t apart) {
    all_rows<2, T>(call, weight, panel, apart, x, stride);
  });
  abreast<1>(begin, end, [&](int64_t panel, int64_t apart) { all_rows<1, T>(call, weight, panel, apart, x, stride); });
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
