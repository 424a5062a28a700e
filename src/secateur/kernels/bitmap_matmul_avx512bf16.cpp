// Steps of a bitmap in bfloat16 times pairs of x, an instruction for both inputs of sixteen outputs: for processors
// that multiply pairs as fast as floats and have no matrix unit.
#include "bitmap_rows.h"

namespace {

struct Pairs {
  typedef bf16 Value, Kept, Input;
  typedef uint32_t Word;
  typedef __m512bh Weights, Inputs;
  enum { TWICE = 4, TURNED = true, MOST = 8, ABREAST = 3, ONCE = 32 };

  static Weights weights(__m512i step) { return (__m512bh)step; }
  static Inputs inputs(const Input* x) { return pair_of(x); }
  static void add(__m512& sum, __m512&, Weights w, Inputs x) { sum = _mm512_dpbf16_ps(sum, w, x); }
};

}  // namespace

extern "C" void bitmap_matmul_bf16_avx512bf16(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  Rows<Pairs>::turned(call, *static_cast<const Bitmap*>(call.weight), nullptr).panels(begin, end);
}
