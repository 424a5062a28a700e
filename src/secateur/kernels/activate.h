// What stands between products: numbers held between bounds, or x / (1 + e^-x), and a product with others.
#pragma once
#include "kernels.h"

enum { HELD, SILU };  // kinds
enum { SPAN = 8192 };  // numbers of an item

struct Activate {
  const void* x;      // [count]
  const void* times;  // likewise, or null: what the outcome, rounded, is multiplied with
  void* y;            // likewise, and may be x
  int64_t count, kind;
  float low, high;  // what HELD holds x between; NaN stays
};
