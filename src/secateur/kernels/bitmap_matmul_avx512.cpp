// Steps of a bitmap times floats. On a Xeon a step takes at least three cycles (the mask to a mask register, and the two
// halves of expand), in which one core reads less than it holds up to about 70 % sparsity: until there the memory is the
// limit.
#include "bitmap_rows.h"

namespace {

// A step of floats is one input.
struct Singles {
  typedef float Value, Kept, Input;
  typedef uint16_t Word;
  typedef __m512 Weights, Inputs;
  enum { TWICE = 2, TURNED = false, MOST = 8, ABREAST = 3, ONCE = 0 };

  static Weights weights(__m512i step) { return _mm512_castsi512_ps(step); }
  static Inputs inputs(const Input* x) { return _mm512_set1_ps(*x); }
  static void add(__m512& sum, __m512&, Weights w, Inputs x) { sum = _mm512_fmadd_ps(w, x, sum); }
};

// The two inputs of each lane of a step of 16-bit values.
inline __m512 lower(__m512i step, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(step, 16)); }

inline __m512 upper(__m512i step, bf16) {
  return _mm512_castsi512_ps(_mm512_and_si512(step, _mm512_set1_epi32(0xffff0000)));
}

inline __m512 lower(__m512i step, f16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(step)); }

inline __m512 upper(__m512i step, f16) { return lower(_mm512_srli_epi32(step, 16), f16()); }

// A step of 16-bit values is two inputs, of which x has floats.
template <class T>
struct Halves {
  typedef T Value, Kept;
  typedef float Input;
  typedef uint32_t Word;
  struct Weights {
    __m512 first, second;
  };
  typedef Weights Inputs;
  enum { TWICE = 2, TURNED = false, MOST = 8, ABREAST = 3, ONCE = 0 };

  static Weights weights(__m512i step) { return {lower(step, T()), upper(step, T())}; }
  static Inputs inputs(const Input* x) { return {_mm512_set1_ps(x[0]), _mm512_set1_ps(x[1])}; }
  static void add(__m512& sum, __m512& other, Weights w, Inputs x) {
    sum = _mm512_fmadd_ps(w.first, x.first, sum);
    other = _mm512_fmadd_ps(w.second, x.second, other);
  }
};

// x is widened to floats beforehand.
template <class T>
void widened(const Matmul& call, int64_t begin, int64_t end) {
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  const int64_t inputs = weight.inputs, stride = (inputs + 15) / 16 * 16;
  float* const x = static_cast<float*>(scratch(call.rows * stride * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++)
    for (int64_t input = 0; input < inputs; input += 16)
      _mm512_store_ps(x + row * stride + input,
                      load(static_cast<const T*>(call.x) + row * inputs + input, first(inputs - input)));
  Rows<Halves<T>>{call, weight, x, stride, nullptr, nullptr}.panels(begin, end);
}

}  // namespace

extern "C" void bitmap_matmul_f32_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  Rows<Singles>{call, weight, static_cast<const float*>(call.x), weight.inputs, nullptr, nullptr}.panels(begin, end);
}

extern "C" void bitmap_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  widened<bf16>(*static_cast<const Matmul*>(call), begin, end);
}

extern "C" void bitmap_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  widened<f16>(*static_cast<const Matmul*>(call), begin, end);
}
