// A step is one expand of bytes: sixteen outputs by four inputs. The byte of each input is moved to the top of its lane
// and down again with its sign, becomes a float and is multiplied; the scale of an output comes in once, at the end.
#include "bitmap.h"
#include "wide.h"

namespace {

enum { DEPTH = 4, AHEAD = 2048 };

// The weights of input i of a step.
template <int I>
inline __m512 weights(__m512i step) {
  const __m512i top = I == 3 ? step : _mm512_slli_epi32(step, 24 - 8 * I);
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
}

template <int N>
void sums(const uint64_t* masks, const int8_t* values, int64_t steps, const float* x, int64_t stride, __m512* sum) {
  __m512 even[N], odd[N];
  for (int n = 0; n < N; n++) even[n] = odd[n] = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; step++) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    const __m512i all = expanded(masks[step], values);
    values += __builtin_popcountll(masks[step]);
    const __m512 w0 = weights<0>(all), w1 = weights<1>(all), w2 = weights<2>(all), w3 = weights<3>(all);
    for (int n = 0; n < N; n++) {
      const float* const at = x + n * stride + DEPTH * step;
      even[n] = _mm512_fmadd_ps(w0, _mm512_set1_ps(at[0]), even[n]);
      odd[n] = _mm512_fmadd_ps(w1, _mm512_set1_ps(at[1]), odd[n]);
      even[n] = _mm512_fmadd_ps(w2, _mm512_set1_ps(at[2]), even[n]);
      odd[n] = _mm512_fmadd_ps(w3, _mm512_set1_ps(at[3]), odd[n]);
    }
  }
  for (int n = 0; n < N; n++) sum[n] = _mm512_add_ps(even[n], odd[n]);
}

template <int N, class T>
void rows(const Matmul& call, const BitmapInt8& scaled, int64_t panel, int64_t row, const float* x, int64_t stride) {
  const Bitmap& weight = scaled.bitmap;
  const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH, at = panel * LANES;
  const int8_t* values = static_cast<const int8_t*>(weight.values) + weight.offsets[panel];
  __m512 sum[N];
  sums<N>(reinterpret_cast<const uint64_t*>(weight.masks) + panel * steps, values, steps, x + row * stride, stride, sum);
  const __mmask16 lanes = first(weight.outputs - at);
  const __m512 scale = load(static_cast<const T*>(scaled.scales) + at, lanes);
  const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
  for (int n = 0; n < N; n++)
    store(static_cast<T*>(call.y) + (row + n) * weight.outputs + at, lanes, _mm512_fmadd_ps(sum[n], scale, bias));
}

// x as floats, with zeros up to a whole number of steps.
template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const BitmapInt8& weight = *static_cast<const BitmapInt8*>(call.weight);
  const int64_t inputs = weight.bitmap.inputs, stride = (inputs + 15) / 16 * 16;
  float* const x = static_cast<float*>(scratch(call.rows * stride * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++)
    for (int64_t input = 0; input < inputs; input += 16)
      _mm512_store_ps(x + row * stride + input,
                      load(static_cast<const T*>(call.x) + row * inputs + input, first(inputs - input)));
  for (int64_t panel = begin; panel < end; panel++) {
    int64_t row = 0;
    for (; row + 8 <= call.rows; row += 8) rows<8, T>(call, weight, panel, row, x, stride);
    if (call.rows - row >= 4) rows<4, T>(call, weight, panel, row, x, stride), row += 4;
    if (call.rows - row >= 2) rows<2, T>(call, weight, panel, row, x, stride), row += 2;
    if (call.rows - row >= 1) rows<1, T>(call, weight, panel, row, x, stride);
  }
}

}  // namespace

extern "C" void bitmap_int8_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
