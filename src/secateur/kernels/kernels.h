// What every kernel is: a function over a range of independent items, called with one pointer to its arguments.
//
// A kernel computes items [begin, end) and nothing else. It starts no thread, allocates nothing (see scratch), and
// does not know how many threads there are: library.cpp and pool.cpp see to that. So a variant for an instruction set
// has the same signature as the scalar one, its oracle, and is checked against it on the same grid.
//
// Nothing here or in a file built for a higher level may include a part of the standard library that defines inline
// functions: the linker keeps one copy of each, and it could keep the one an older machine cannot run.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define SECATEUR_API extern "C" __attribute__((visibility("default")))

extern "C" {

typedef void Kernel(const void* call, int64_t begin, int64_t end);

// The arguments of a matrix product, y = x W^T + bias, for any format: `weight` points to the format's own struct.
struct Matmul {
  const void* weight;
  const void* x;     // [rows, inputs], rows next to one another
  void* y;           // [rows, outputs], likewise
  const void* bias;  // [outputs], in the type of y, or null
  int64_t rows;
};

// Memory of the calling thread, 64-byte aligned, valid until the thread asks again: no allocation per call. The process
// ends when the machine has none left.
void* scratch(size_t bytes);

// Whether it pays to ask memory for what a kernel that reads in order, for one row, comes to next. On processors that look
// ahead as far by themselves (AMD's Zen 4) it costs a fifth of the speed of large weights.
bool asks_ahead();

// Whether numbers that come together and are moved to all lanes one by one take less than a load for each, as on AMD's Zen 5,
// where a loop of products in bfloat16 is 5 to 10 % faster so. On others it was not measured.
bool moves_lanes();

}  // extern "C"
