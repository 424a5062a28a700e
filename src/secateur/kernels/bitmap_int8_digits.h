// Eight-bit values in whole numbers throughout. A row of x becomes fixed-point numbers below a power of two of its own,
// cut into digits of 8 bits, the lowest first: x = sum of digit[d] * 2^(8 d - shift). A step of a bitmap, sixteen
// outputs by four inputs, is multiplied with the digits of its inputs by one instruction a digit. Sums are exact; what
// they amount to is rounded once, as a float, at the end.
//
// Three or four digits hold a row whose smallest number is not further from the largest than their bits reach, eight nearly
// any other. A row that does not fit into eight, or is not finite, goes through the variant that adds floats.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "bitmap.h"
#include "streams.h"
#include "wide.h"

extern "C" Kernel bitmap_int8_matmul_f32_avx512, bitmap_int8_matmul_bf16_avx512, bitmap_int8_matmul_f16_avx512;

namespace {

enum { DEPTH = 4, TILE_STEPS = 16, TILE = 64, HEIGHT = 16, AHEAD = 2048, MASKS_AHEAD = 768, FEW = 3, WIDEST = 1 << 17 };

void floats(const Matmul& call, int64_t begin, int64_t end, float) { bitmap_int8_matmul_f32_avx512(&call, begin, end); }
void floats(const Matmul& call, int64_t begin, int64_t end, bf16) { bitmap_int8_matmul_bf16_avx512(&call, begin, end); }
void floats(const Matmul& call, int64_t begin, int64_t end, f16) { bitmap_int8_matmul_f16_avx512(&call, begin, end); }

inline int significant(float) { return 24; }  // bits of a number, the implied one included
inline int significant(bf16) { return 8; }
inline int significant(f16) { return 11; }

inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
}

// Which bits a row of x spans: the exponents of its largest number and of its smallest that is not zero, as floats have
// them in their bits.
struct Span {
  int highest, lowest;

  // Digits that hold the row, 3, 4 or 8, or 0 where none do.
  template <class T>
  int digits(T type) const {
    if (highest == 255) return 0;
    const int bits = highest - lowest + significant(type) + 2;  // a sign, and one so that the first digit is whole
    return bits <= 24 ? 3 : bits <= 32 ? 4 : bits <= 64 ? 8 : 0;
  }

  // The power of two that a row is multiplied with to fill its digits.
  int shift(int digits) const { return 8 * digits - 2 - (highest - 126); }
};

template <class T>
Span span(const T* x, int64_t inputs) {
  const __m512i most = _mm512_set1_epi32(254), one = _mm512_set1_epi32(1);
  __m512i high = one, low = most;
  for (int64_t input = 0; input < inputs; input += 16) {
    const __m512i bits = _mm512_castps_si512(load(x + input, first(inputs - input)));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i exponent = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 23), one);
    high = _mm512_max_epi32(high, exponent);
    low = _mm512_mask_min_epi32(low, _mm512_test_epi32_mask(magnitude, magnitude), low, exponent);
  }
  const int highest = _mm512_reduce_max_epi32(high), lowest = _mm512_reduce_min_epi32(low);
  return {highest, lowest < highest ? lowest : highest};
}

// Rows of x that go together, up to sixteen, in digits: [tiles, digits, rows, 64] bytes, zero beyond the last input.
struct Digits {
  int64_t row, rows;  // of x
  int64_t tiles;
  int digits;  // 3, 4 or 8
  int8_t* at;
  int shifts[HEIGHT];       // of each row
  int32_t sums[HEIGHT][8];  // of the digits of each row

  int64_t tile() const { return digits * rows * TILE; }

  template <class T>
  void fill(const T* x, int64_t inputs) {
    for (int64_t r = 0; r < rows; r++) fill(r, x + (row + r) * inputs, inputs);
  }

  template <class T>
  void fill(int64_t row, const T* x, int64_t inputs) {
    const Span found = span(x, inputs);
    shifts[row] = found.shift(digits);
    // Digits from -128 to 127: half of their range is added to all of them, carries included, and taken from each.
    const __m512i half = _mm512_set1_epi64(int64_t(0x8080808080808080 >> (64 - 8 * digits)));
    const __m512d factor = _mm512_set1_pd(power_of_two(shifts[row]));
    alignas(64) uint8_t turned[64];
    for (int i = 0; i < 64; i++) turned[i] = uint8_t(i % 8 * 8 + i / 8);
    const __m512i turn = _mm512_load_si512(turned);
    const __m512i apart = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(rows * TILE));
    const __mmask8 held = __mmask8(0xff >> (8 - digits));
    for (int64_t input = 0; input < tiles * TILE; input += 8) {
      const __mmask16 there = input < inputs ? first(inputs - input) & 0xff : 0;
      const __m512d eight = _mm512_cvtps_pd(_mm512_castps512_ps256(load(x + input, there)));
      const __m512i whole = _mm512_cvtpd_epi64(_mm512_mul_pd(eight, factor));
      const __m512i bytes = _mm512_xor_si512(_mm512_add_epi64(whole, half), half);
      int8_t* const to = at + input / TILE * tile() + row * TILE + input % TILE;
      _mm512_mask_i64scatter_epi64(to, held, apart, _mm512_permutexvar_epi8(turn, bytes), 1);
    }
    for (int d = 0; d < digits; d++) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t t = 0; t < tiles; t++)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1),
                                  _mm512_loadu_si512(at + t * tile() + (d * rows + row) * TILE));
      sums[row][d] = _mm512_reduce_add_epi32(sum);
    }
  }
};

// The steps of a panel.
struct Stream {
  const uint64_t* masks;
  const int8_t* values;

  void begin(const Bitmap& weight, int64_t panel) {
    masks = reinterpret_cast<const uint64_t*>(weight.masks) + panel * ((weight.inputs + DEPTH - 1) / DEPTH);
    values = static_cast<const int8_t*>(weight.values) + weight.offsets[panel];
  }

  template <bool WHOLE = false>
  inline __m512i next() {
    if constexpr (WHOLE) {
      values += LANES * DEPTH;
      return _mm512_loadu_si512(values - LANES * DEPTH);
    }
    const uint64_t mask = *masks++;
    const __m512i step = expanded(mask, values);
    values += __builtin_popcountll(mask);
    return step;
  }

  inline void prefetch() const {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(masks) + MASKS_AHEAD, _MM_HINT_T0);
  }
};

// What the sums of sixteen outputs, a register for each digit, amount to, written to a row of y.
template <class T>
void write(const Matmul& call, const BitmapInt8& scaled, int64_t panel, int64_t row, const __m512i* sums, int digits,
           int shift) {
  __m512d low = _mm512_setzero_pd(), high = low;
  const __m512d byte = _mm512_set1_pd(256);
  for (int d = digits - 1; d >= 0; d--) {
    low = _mm512_fmadd_pd(low, byte, _mm512_cvtepi32_pd(_mm512_castsi512_si256(sums[d])));
    high = _mm512_fmadd_pd(high, byte, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sums[d], 1)));
  }
  const __m512d back = _mm512_set1_pd(power_of_two(-shift));
  const __m256 first_half = _mm512_cvtpd_ps(_mm512_mul_pd(low, back));
  const __m256 second_half = _mm512_cvtpd_ps(_mm512_mul_pd(high, back));
  const __m512 sum = _mm512_insertf32x8(_mm512_castps256_ps512(first_half), second_half, 1);
  const int64_t at = panel * LANES, outputs = scaled.bitmap.outputs;
  const __mmask16 lanes = first(outputs - at);
  const __m512 scale = load(static_cast<const T*>(scaled.scales) + at, lanes);
  const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
  store(static_cast<T*>(call.y) + row * outputs + at, lanes, _mm512_fmadd_ps(sum, scale, bias));
}

// One row of x times some panels side by side, `apart` from one to the next. The instruction takes weights as they are above
// -128, so 128 times the digits is taken from the sums before they begin.
// `WHOLE`: nothing of them was left out, and their values are steps as they lie.
template <int PANELS, int DIGITS, bool WHOLE, class T>
void one_row(const Matmul& call, const BitmapInt8& scaled, const Digits& x, int64_t panel, int64_t apart,
             int64_t at) {
  const bool asks = asks_ahead();
  const __m512i offset = _mm512_set1_epi8(-128);
  const int64_t steps = (scaled.bitmap.inputs + DEPTH - 1) / DEPTH, stride = x.rows * TILE;
  Stream weights[PANELS];
  __m512i sum[PANELS][DIGITS];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; p++) {
    weights[p].begin(scaled.bitmap, panel + p * apart);
#pragma GCC unroll 8
    for (int d = 0; d < DIGITS; d++)  // modulo 2^32, as sums are
      sum[p][d] = _mm512_set1_epi32(int32_t(-128u * uint32_t(x.sums[at][d])));
  }
  const int8_t* in = x.at + at * TILE;
  for (int64_t tile = 0; tile < steps; tile += TILE_STEPS, in += DIGITS * stride) {
    const int64_t count = steps - tile < TILE_STEPS ? steps - tile : int64_t(TILE_STEPS);
    for (int64_t step = 0; step < count; step++) {
      __m512i four[DIGITS];
#pragma GCC unroll 8
      for (int d = 0; d < DIGITS; d++) {
        int32_t digits;
        __builtin_memcpy(&digits, in + d * stride + DEPTH * step, 4);
        four[d] = _mm512_set1_epi32(digits);
      }
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) {
        if (!WHOLE || asks) weights[p].prefetch();
        const __m512i some = _mm512_xor_si512(weights[p].template next<WHOLE>(), offset);
#pragma GCC unroll 8
        for (int d = 0; d < DIGITS; d++) sum[p][d] = _mm512_dpbusd_epi32(sum[p][d], some, four[d]);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; p++) {
    __m512i all[DIGITS];  // a copy: the sums themselves stay in registers
#pragma GCC unroll 8
    for (int d = 0; d < DIGITS; d++) all[d] = sum[p][d];
    write<T>(call, scaled, panel + p * apart, x.row + at, all, DIGITS, x.shifts[at]);
  }
}

template <int PANELS, int DIGITS, class T>
int64_t each_panel(const Matmul& call, const BitmapInt8& scaled, const Digits& x, int64_t begin, int64_t end, int64_t at) {
  return abreast<PANELS>(begin, end, [&](int64_t panel, int64_t apart) {
    if (whole(scaled.bitmap, DEPTH, PANELS, panel, apart))
      one_row<PANELS, DIGITS, true, T>(call, scaled, x, panel, apart, at);
    else
      one_row<PANELS, DIGITS, false, T>(call, scaled, x, panel, apart, at);
  });
}

template <int DIGITS, class T>
void each_row(const Matmul& call, const BitmapInt8& scaled, const Digits& x, int64_t begin, int64_t end) {
  for (int64_t at = 0; at < x.rows; at++) {
    int64_t left = begin;
    if constexpr (DIGITS < 8)  // of eight there are registers for the sums of two panels
      left = each_panel<STREAMS, DIGITS, T>(call, scaled, x, left, end, at);
    left = each_panel<2, DIGITS, T>(call, scaled, x, left, end, at);
    each_panel<1, DIGITS, T>(call, scaled, x, left, end, at);
  }
}

// Sums of more inputs would not fit into 32 bits.
template <class T>
int digits_of(const T* x, int64_t inputs) {
  return inputs > WIDEST ? 0 : span(x, inputs).digits(T());
}

// The rows from one on that go together: how many, and in how many digits.
template <class T>
int64_t together(const Matmul& call, int64_t inputs, int64_t row, int& digits) {
  const T* const x = static_cast<const T*>(call.x);
  digits = digits_of(x + row * inputs, inputs);
  int64_t next = row + 1;
  for (; next < call.rows && next < row + HEIGHT; next++) {
    const int more = digits_of(x + next * inputs, inputs);
    if (!more != !digits) break;
    digits = more > digits ? more : digits;
  }
  return next - row;
}

// Rows that go together in digits, a few of them by vectors, more by what the caller has for many; and the others as
// floats.
template <class T, class Many>
void in_digits(const void* pointer, int64_t begin, int64_t end, const Many& many) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const BitmapInt8& scaled = *static_cast<const BitmapInt8*>(call.weight);
  const int64_t inputs = scaled.bitmap.inputs;
  int digits;
  for (int64_t row = 0, count; row < call.rows; row += count) {
    count = together<T>(call, inputs, row, digits);
    if (!digits) {
      Matmul part = call;
      part.x = static_cast<const T*>(call.x) + row * inputs;
      part.y = static_cast<T*>(call.y) + row * scaled.bitmap.outputs;
      part.rows = count;
      floats(part, begin, end, T());
      continue;
    }
    Digits x;
    x.row = row;
    x.rows = count;
    x.tiles = (inputs + TILE - 1) / TILE;
    x.digits = count > FEW && digits == 3 ? 4 : digits;  // what many rows are multiplied by takes four or eight
    x.at = static_cast<int8_t*>(scratch(x.tiles * x.tile()));
    x.fill(static_cast<const T*>(call.x), inputs);
    if (count > FEW)
      many(call, scaled, x);
    else if (digits == 3)
      each_row<3, T>(call, scaled, x, begin, end);
    else if (digits == 4)
      each_row<4, T>(call, scaled, x, begin, end);
    else
      each_row<8, T>(call, scaled, x, begin, end);
  }
}

}  // namespace
