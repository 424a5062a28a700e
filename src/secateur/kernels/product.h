// A product of two matrices added to a third, as solvers and what they measure need it (axes/products.py):
//
//   to_ij = to_ij + scale * sum over k of left_ik right_jk
//
// for all i and j, or for all where j <= i, at least. An item is 64 rows of `to`.
#pragma once
#include "kernels.h"
#include "numbers.h"

enum { ROWS_OF_AN_ITEM = 64 };

// A matrix whose rows lie `apart`, and the elements of one `step`: one of the two is 1.
struct Strided {
  const void* data;
  int64_t apart, step;
};

struct Product {
  Strided left;   // [rows, depth], float or bf16
  Strided right;  // [columns, depth], likewise
  float* to;      // [rows, columns], `apart` from one row to the next
  int64_t apart;
  int64_t rows, columns, depth;
  float scale;
  int32_t fresh;  // what `to` holds does not count
  int32_t lower;  // only the lower triangle is wanted
};
