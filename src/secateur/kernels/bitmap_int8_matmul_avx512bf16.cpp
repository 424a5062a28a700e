// Eight-bit values on processors that multiply bytes and pairs of bfloat16 and have no matrix unit: a few rows of x in
// digits of whole numbers; more in bfloat16, which holds the values exactly, two instructions for the four inputs of a
// step, and where x is no bfloat16 as floats.
#include "bitmap_int8_digits.h"
#include "bitmap_rows.h"

namespace {

// The bytes of bfloat16 numbers from 0 to 127.
struct Table {
  alignas(64) uint8_t low[128], high[128];

  constexpr Table() : low(), high() {
    for (int value = 1; value < 128; value++) {
      int exponent = 0;
      while (value >> (exponent + 1)) exponent++;
      const int bits = (127 + exponent) << 7 | ((value << (7 - exponent)) & 0x7f);
      low[value] = uint8_t(bits);
      high[value] = uint8_t(bits >> 8);
    }
  }
};

constexpr Table table;

struct Bytes {
  typedef bf16 Value, Input;
  typedef int8_t Kept;
  typedef uint64_t Word;
  struct Weights {
    __m512bh first, second;
  };
  typedef Weights Inputs;
  enum { TWICE = 4, TURNED = true, MOST = 16, ABREAST = 1, ONCE = 32 };

  // The magnitudes are looked up byte by byte, the sign is put on, and the halves of a lane's four numbers part.
  static Weights weights(__m512i step) {
    const __m512i size = _mm512_abs_epi8(step);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), size, _mm512_load_si512(table.low + 64));
    const __m512i magnitude =
        _mm512_permutex2var_epi8(_mm512_load_si512(table.high), size, _mm512_load_si512(table.high + 64));
    const __m512i high = _mm512_or_si512(magnitude, _mm512_and_si512(step, _mm512_set1_epi8(-128)));
    const __m512 some = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    const __m512 rest = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
    return {(__m512bh)_mm512_shuffle_ps(some, rest, 0x88), (__m512bh)_mm512_shuffle_ps(some, rest, 0xdd)};
  }

  static Inputs inputs(const Input* x) { return {pair_of(x), pair_of(x + 2)}; }

  static void add(__m512& sum, __m512& other, Weights w, Inputs x) {
    sum = _mm512_dpbf16_ps(sum, w.first, x.first);
    other = _mm512_dpbf16_ps(other, w.second, x.second);
  }
};

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  if (call.rows > FEW) return floats(call, begin, end, T());
  in_digits<T>(pointer, begin, end, [](const Matmul&, const BitmapInt8&, const Digits&) {});  // never more than FEW
}

}  // namespace

extern "C" void bitmap_int8_matmul_f32_avx512bf16(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_bf16_avx512bf16(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  if (call.rows <= FEW) return matmul<bf16>(pointer, begin, end);
  const BitmapInt8& scaled = *static_cast<const BitmapInt8*>(call.weight);
  Rows<Bytes>::turned(call, scaled.bitmap, scaled.scales).panels(begin, end);
}

extern "C" void bitmap_int8_matmul_f16_avx512bf16(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
