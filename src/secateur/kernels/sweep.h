// Some columns of a matrix in turn, each mended for what those before it lost (axes/solvers.py):
//
//   w~_j = w_j + (push_j + sum over i < j of R_ji (w_i - q_i)) / R_jj       q_j = w~_j where it stays, else 0
//
// A column of the matrix is a row here, so that sixteen rows of the matrix are the lanes of a register.
#pragma once
#include "kernels.h"

struct Sweep {
  const float* plain;    // [columns, rows]: w
  const float* push;     // [columns, rows]: what earlier columns ask of these
  const float* factor;   // [columns, columns], `stride` from one row to the next: R, lower triangular
  const uint8_t* stays;  // [columns, rows]
  float* change;         // [columns, rows]: w - q
  int64_t rows, columns, stride;
};
