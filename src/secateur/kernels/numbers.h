// Half-precision numbers for the scalar kernels. Static: each file keeps the copy compiled with its own flags.
#pragma once
#include <stdint.h>

typedef uint16_t bf16;  // the upper half of a float
struct f16 {            // a type of its own, so that templates tell it from bf16
  uint16_t bits;
};

static inline float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static inline float widen(float value) { return value; }

static inline float widen(bf16 value) { return float_of_bits(uint32_t(value) << 16); }

static inline float widen(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity and NaN
  // The exponent is moved by a multiplication, which is exact and takes care of subnormal numbers.
  const float magnitude = float_of_bits(rest << 13) * float_of_bits(uint32_t(127 + 112) << 23);
  return float_of_bits(sign | bits_of_float(magnitude));
}

// To the nearest, ties to even, as torch rounds.
static inline void narrow(float value, float* to) { *to = value; }

static inline void narrow(float value, bf16* to) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000)
    *to = uint16_t(bits >> 16 | 0x40);  // a NaN must stay one when its lower half is cut off
  else
    *to = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void narrow(float value, f16* to) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the last bits
    half = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to->bits = uint16_t(sign | half);
}
