// The exact choice: of each row the lowest `drop` scores go, in the order (score, then index).
//
// Scores are compared as whole numbers whose order is that of the floats: the sign bit flipped, or all of them for a
// negative one; zero has one sign.
#pragma once
#include "kernels.h"
#include "numbers.h"

enum {
  SMALL = 16,       // rows up to this long are ranked by comparing all pairs
  LONG = 1 << 15,   // from here on a row is read three times, digit by digit, instead of halving the range of scores
  DIGITS = 1 << 11
};

struct Select {
  const float* score;  // [rows, width]
  uint8_t* keep;       // [rows, width], 1 for what stays
  int32_t* odd;        // set to 1 when a score is NaN
  int64_t rows, width, drop;
  int64_t together;  // rows of an item
};

static inline uint32_t key(float score) {
  const uint32_t bits = bits_of_float(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// NaNs stand above plus infinity and below minus infinity.
static inline bool number(uint32_t key) { return key <= 0xff800000u && key >= 0x007fffffu; }

// The `drop`-th lowest key of a long row by its digits, the highest first; `ties` is how many that equal it go.
static inline uint32_t digit_by_digit(const float* score, int64_t width, int64_t drop, int64_t* ties, int32_t* odd) {
  const int shift[] = {21, 10, 0}, bits[] = {11, 11, 10};
  uint32_t prefix = 0;
  int64_t left = drop;
  for (int turn = 0; turn < 3; turn++) {
    // Four counters a digit: most scores share a few, and an addition to the same place waits for the one before.
    int64_t* const count = static_cast<int64_t*>(scratch(4 * DIGITS * sizeof(int64_t)));
    for (int digit = 0; digit < 4 * DIGITS; digit++) count[digit] = 0;
    const uint32_t mask = (1u << bits[turn]) - 1;
    if (turn == 0) {
      bool all = true;
      for (int64_t i = 0; i < width; i++) {
        const uint32_t k = key(score[i]);
        all &= number(k);
        count[4 * (k >> shift[0]) + (i & 3)]++;
      }
      if (!all) *odd = 1;
    } else {
      const int above = shift[turn - 1];
      for (int64_t i = 0; i < width; i++) {
        const uint32_t k = key(score[i]);
        if (k >> above == prefix >> above) count[4 * (k >> shift[turn] & mask) + (i & 3)]++;
      }
    }
    uint32_t digit = 0;
    for (int64_t here; left > (here = count[4 * digit] + count[4 * digit + 1] + count[4 * digit + 2] + count[4 * digit + 3]);
         digit++)
      left -= here;
    prefix |= digit << shift[turn];
  }
  *ties = left;
  return prefix;
}
