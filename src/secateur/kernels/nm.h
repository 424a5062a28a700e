// N:M: of each M consecutive inputs an output keeps N weights at most.
//
// Sixteen outputs are the lanes of a panel. A slot is one weight of each lane with its place, the number of its input
// within the group, in 2 bits a lane for M up to 4 and in 4 bits above. What is missing is a zero at place 0.
//
// As with sell.h, a row of x that holds something not finite goes through the oracle.
#pragma once
#include "kernels.h"

enum { LANES = 16 };

struct NM {
  int64_t outputs, inputs, n, m;
  const uint8_t* places;  // [panels, groups, n, 4 or 8 bytes]
  const void* values;     // [panels, groups, n, 16]
};

// One panel for one row of x, whatever is in it.
extern "C" void nm_row_f32(const Matmul* call, int64_t panel, int64_t row);
extern "C" void nm_row_bf16(const Matmul* call, int64_t panel, int64_t row);
extern "C" void nm_row_f16(const Matmul* call, int64_t panel, int64_t row);
