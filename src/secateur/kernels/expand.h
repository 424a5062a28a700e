// A packed weight written out as a dense matrix, for products with so many rows that the dense product, on the tiles of
// the matrix unit, makes up for the writing.
#pragma once
#include "kernels.h"

struct Expand {
  const void* weight;  // the format's own struct
  void* dense;         // [outputs, inputs], to be written whole
};
