// Without an expand instruction: the kept values of eight bits are loaded side by side and put in their places by a
// permutation, which a table holds for each of the 256 masks. Sixteen lanes are two registers.
#include "bitmap.h"
#include "eight.h"

namespace {

enum { AHEAD = 1024 };  // bytes

// places[m][i]: which of the values side by side belongs to bit i of mask m, or `nothing`.
template <class Place>
struct alignas(64) Places {
  Place at[256][8];

  constexpr explicit Places(Place nothing) : at() {
    for (int mask = 0; mask < 256; mask++) {
      int next = 0;
      for (int i = 0; i < 8; i++) at[mask][i] = mask >> i & 1 ? Place(next++) : nothing;
    }
  }
};

constexpr Places<uint8_t> places(0);

// For 16-bit values the table holds the byte shuffle itself; 0x80 makes a zero.
struct alignas(64) Shuffles {
  uint8_t at[256][16];

  constexpr Shuffles() : at() {
    for (int mask = 0; mask < 256; mask++) {
      int next = 0;
      for (int i = 0; i < 8; i++) {
        const bool kept = mask >> i & 1;
        at[mask][2 * i] = kept ? uint8_t(2 * next) : 0x80;
        at[mask][2 * i + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
        next += kept;
      }
    }
  }
};

constexpr Shuffles shuffles;

const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

inline __m256 expand(uint8_t mask, const float*& values) {
  const int count = __builtin_popcount(mask);
  // No more is read than is there: the values may end with their page.
  const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 8 - count));
  const __m256 packed = _mm256_maskload_ps(values, some);
  values += count;
  const __m128i where = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.at[mask]));
  const __m256 placed = _mm256_permutevar8x32_ps(packed, _mm256_cvtepu8_epi32(where));
  // Bit i of the mask to all bits of lane i.
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
  return _mm256_and_ps(placed, _mm256_castsi256_ps(kept));
}

// Eight 16-bit values; `end` is where all values end.
inline __m128i expand(uint8_t mask, const uint16_t*& values, const uint16_t* end) {
  const int count = __builtin_popcount(mask);
  __m128i packed;
  if (end - values >= 8) {
    packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  } else {
    uint16_t last[8] = {};
    for (int i = 0; i < count; i++) last[i] = values[i];
    packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(last));
  }
  values += count;
  return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.at[mask])));
}

inline void prefetch(const void* values) {
  _mm_prefetch(static_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
}

template <int N>
void sums(const uint8_t* masks, const float* values, const float*, int64_t inputs, const float* x, int64_t stride,
          __m256 (*sum)[2]) {
  for (int64_t input = 0; input < inputs; input++) {
    prefetch(values);
    const __m256 low = expand(masks[2 * input], values);
    const __m256 high = expand(masks[2 * input + 1], values);
    for (int n = 0; n < N; n++) {
      const __m256 all = _mm256_broadcast_ss(x + n * stride + input);
      sum[n][0] = _mm256_fmadd_ps(low, all, sum[n][0]);
      sum[n][1] = _mm256_fmadd_ps(high, all, sum[n][1]);
    }
  }
}

inline __m256 lower(__m256i step, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(step, 16)); }

inline __m256 upper(__m256i step, bf16) {
  return _mm256_castsi256_ps(_mm256_and_si256(step, _mm256_set1_epi32(int(0xffff0000))));
}

inline __m256 lower(__m256i step, f16) {  // the eight lower halves side by side, then widened
  const __m256i halves = _mm256_and_si256(step, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

inline __m256 upper(__m256i step, f16) { return lower(_mm256_srli_epi32(step, 16), f16()); }

// 16-bit values, x widened to floats beforehand, with a zero after an odd number of inputs.
template <int N, class T>
void sums(const uint8_t* masks, const T* begin, const T* end, int64_t inputs, const float* x, int64_t stride,
          __m256 (*sum)[2]) {
  const uint16_t* values = reinterpret_cast<const uint16_t*>(begin);
  const uint16_t* const stop = reinterpret_cast<const uint16_t*>(end);
  for (int64_t step = 0; step < (inputs + 1) / 2; step++) {
    prefetch(values);
    for (int half = 0; half < 2; half++) {
      const __m128i first = expand(masks[4 * step + 2 * half], values, stop);
      const __m128i second = expand(masks[4 * step + 2 * half + 1], values, stop);
      const __m256i both = _mm256_set_m128i(second, first);
      const __m256 even = lower(both, T()), odd = upper(both, T());
      for (int n = 0; n < N; n++) {
        const float* const at = x + n * stride + 2 * step;
        sum[n][half] = _mm256_fmadd_ps(even, _mm256_broadcast_ss(at), sum[n][half]);
        sum[n][half] = _mm256_fmadd_ps(odd, _mm256_broadcast_ss(at + 1), sum[n][half]);
      }
    }
  }
}

template <int N, class T>
void rows(const Matmul& call, const Bitmap& weight, int64_t panel, int64_t row, const float* x, int64_t stride) {
  const int64_t depth = 4 / sizeof(T), steps = (weight.inputs + depth - 1) / depth;
  const int64_t all = (weight.outputs + LANES - 1) / LANES;
  const T* const values = static_cast<const T*>(weight.values);
  __m256 sum[N][2];
  for (int n = 0; n < N; n++) sum[n][0] = sum[n][1] = _mm256_setzero_ps();
  sums<N>(weight.masks + panel * steps * 2 * depth, values + weight.offsets[panel], values + weight.offsets[all],
          weight.inputs, x + row * stride, stride, sum);
  const int64_t at = panel * LANES;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + at : nullptr;
  for (int n = 0; n < N; n++)
    store_lanes(sum[n][0], sum[n][1], bias, static_cast<T*>(call.y) + (row + n) * weight.outputs + at,
                weight.outputs - at);
}

template <class T>
void panels(const Matmul& call, const float* x, int64_t stride, int64_t begin, int64_t end) {
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  for (int64_t panel = begin; panel < end; panel++) {
    int64_t row = 0;
    for (; row + 4 <= call.rows; row += 4) rows<4, T>(call, weight, panel, row, x, stride);
    if (call.rows - row >= 2) rows<2, T>(call, weight, panel, row, x, stride), row += 2;
    if (call.rows - row >= 1) rows<1, T>(call, weight, panel, row, x, stride);
  }
}

template <class T>
void widened(const Matmul& call, int64_t begin, int64_t end) {
  const int64_t inputs = static_cast<const Bitmap*>(call.weight)->inputs, stride = (inputs + 7) / 8 * 8;
  float* const x = static_cast<float*>(scratch(call.rows * stride * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++) {
    widen_row(static_cast<const T*>(call.x) + row * inputs, inputs, x + row * stride);
    for (int64_t input = inputs; input < stride; input++) x[row * stride + input] = 0;
  }
  panels<T>(call, x, stride, begin, end);
}

}  // namespace

extern "C" void bitmap_matmul_f32_avx2(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  panels<float>(call, static_cast<const float*>(call.x), static_cast<const Bitmap*>(call.weight)->inputs, begin, end);
}

extern "C" void bitmap_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) {
  widened<bf16>(*static_cast<const Matmul*>(call), begin, end);
}

extern "C" void bitmap_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) {
  widened<f16>(*static_cast<const Matmul*>(call), begin, end);
}
