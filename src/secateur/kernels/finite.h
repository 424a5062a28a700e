// Products that leave zeros out and answer as a dense one does: there an output is NaN where a zero of its row meets
// something that is not finite. It is when more of the inputs are not finite than its weights, other than zero, meet.
#pragma once
#include "numbers.h"

namespace {

inline bool finite(float value) { return (bits_of_float(value) & 0x7f800000) != 0x7f800000; }

// How many of the inputs are not finite.
template <class T>
int64_t wild(const T* x, int64_t inputs) {
  int64_t count = 0;
  for (int64_t input = 0; input < inputs; input++) count += !finite(widen(x[input]));
  return count;
}

// The sum of one output.
struct Sum {
  float sum = 0;
  int64_t met = 0;

  void add(float weight, float input) {
    if (weight == 0) return;
    sum += weight * input;
    met += !finite(input);
  }

  float of(int64_t wild) const { return met < wild ? float_of_bits(0x7fc00000) : sum; }
};

}  // namespace
