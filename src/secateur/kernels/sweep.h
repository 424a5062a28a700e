// Some columns of a matrix in turn, each mended for what those before it lost (axes/solvers.py):
//
//   w~_j = w_j + (push_j + sum over i < j of R_ji (w_i - q_i)) / R_jj       q_j = w~_j where it stays, else 0
//
// An item is sixteen rows of the matrix: the lanes of a register. All lie row by row, `_apart` from one to the next.
#pragma once
#include "kernels.h"

struct Sweep {
  const float* plain;    // [rows, columns]: w
  float* push;           // [rows, columns]: what earlier columns ask of these; then q, where it is known what stays
  const float* factor;   // [columns, columns]: R, lower triangular
  const uint8_t* stays;  // [rows, columns]; or null: all stay, and the saliency is asked for
  float* found;          // [rows, columns]: w - q, or the saliency, (w~_j R_jj)^2
  int64_t rows, columns;
  int64_t plain_apart, push_apart, factor_apart, stays_apart, found_apart;
};
