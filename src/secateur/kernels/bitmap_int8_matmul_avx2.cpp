// Without an expand instruction: the kept values of eight bits are loaded side by side and shuffled to their places, as a
// table says for each of the 256 masks: two outputs by four inputs. Their products with those inputs are added up apart,
// and folded into the two outputs at the end. Half of a panel, eight outputs, is done at a time.
#include "bitmap.h"
#include "eight.h"

namespace {

enum { DEPTH = 4, HALF = 4, AHEAD = 1024 };  // HALF: bytes of a step's mask, two outputs each

// For each mask which of the values side by side belongs to a bit; 0x80 makes a zero.
struct alignas(64) Shuffles {
  uint8_t at[256][8];

  constexpr Shuffles() : at() {
    for (int mask = 0; mask < 256; mask++) {
      int next = 0;
      for (int i = 0; i < 8; i++) at[mask][i] = mask >> i & 1 ? uint8_t(next++) : uint8_t(0x80);
    }
  }
};

constexpr Shuffles shuffles;

inline int count(uint32_t masks) { return __builtin_popcount(masks); }

// Eight weights as floats. No more is read than is there: `end` is where all values end.
inline __m256 expand(uint8_t mask, const int8_t* values, const int8_t* end) {
  __m128i packed;
  if (end - values >= 8) {
    packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  } else {
    int8_t last[8] = {};
    for (int i = 0; i < count(mask); i++) last[i] = values[i];
    packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(last));
  }
  const __m128i where = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(shuffles.at[mask]));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(packed, where)));
}

// N rows of x, floats with zeros up to a whole step, times half of a panel: sums of outputs 2 i and 2 i + 1, four each.
template <int N>
void sums(const Bitmap& weight, int64_t panel, int half, const float* x, int64_t stride, __m256 (*sum)[HALF]) {
  const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH, all = (weight.outputs + LANES - 1) / LANES;
  const uint8_t* masks = weight.masks + panel * steps * 2 * HALF;
  const int8_t* values = static_cast<const int8_t*>(weight.values);
  const int8_t* const end = values + weight.offsets[all];
  values += weight.offsets[panel];
  for (int64_t step = 0; step < steps; step++, masks += 2 * HALF) {
    uint32_t low, high;
    __builtin_memcpy(&low, masks, 4);
    __builtin_memcpy(&high, masks + HALF, 4);
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    const int8_t* mine = half ? values + count(low) : values;
    values += count(low) + count(high);
    uint32_t mask = half ? high : low;
#pragma GCC unroll 4
    for (int i = 0; i < HALF; i++, mask >>= 8) {
      const __m256 weights = expand(uint8_t(mask), mine, end);
      mine += count(mask & 0xff);
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + n * stride + DEPTH * step));
        sum[n][i] = _mm256_fmadd_ps(weights, four, sum[n][i]);
      }
    }
  }
}

template <int N, class T>
void rows(const Matmul& call, const BitmapInt8& scaled, int64_t panel, int64_t row, const float* x, int64_t stride) {
  const Bitmap& weight = scaled.bitmap;
  for (int half = 0; half < 2; half++) {
    __m256 sum[N][HALF];
    for (int n = 0; n < N; n++)
      for (int i = 0; i < HALF; i++) sum[n][i] = _mm256_setzero_ps();
    sums<N>(weight, panel, half, x + row * stride, stride, sum);
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 2 * HALF; i++) {
        const int64_t output = panel * LANES + 2 * HALF * half + i;
        if (output >= weight.outputs) break;
        alignas(32) float parts[8];
        _mm256_store_ps(parts, sum[n][i / 2]);
        const float* const four = parts + 4 * (i % 2);
        const float scale = widen(static_cast<const T*>(scaled.scales)[output]);
        const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
        narrow(((four[0] + four[1]) + (four[2] + four[3])) * scale + bias,
               static_cast<T*>(call.y) + (row + n) * weight.outputs + output);
      }
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const BitmapInt8& weight = *static_cast<const BitmapInt8*>(call.weight);
  const int64_t inputs = weight.bitmap.inputs, stride = (inputs + DEPTH - 1) / DEPTH * DEPTH;
  float* const x = static_cast<float*>(scratch(call.rows * stride * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++) {
    widen_row(static_cast<const T*>(call.x) + row * inputs, inputs, x + row * stride);
    for (int64_t input = inputs; input < stride; input++) x[row * stride + input] = 0;
  }
  for (int64_t panel = begin; panel < end; panel++) {
    int64_t row = 0;
    for (; row + 2 <= call.rows; row += 2) rows<2, T>(call, weight, panel, row, x, stride);
    if (row < call.rows) rows<1, T>(call, weight, panel, row, x, stride);
  }
}

}  // namespace

extern "C" void bitmap_int8_matmul_f32_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
