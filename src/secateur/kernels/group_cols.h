// Groups of outputs that keep the same columns, as a stream: for each group its biases, then for each column it keeps
// a weight of every output of the group. A column is an input, or an input and a tap of a convolution. Outputs left
// over by the groups follow one by one.
//
// The stream says where a column is by the step from the one before it, over all groups, and its last step leads back
// to the first. That is what the oracle follows. The variants go through the inputs block by block, so that what they
// read of them stays near, and need for that the groups by blocks, laid out when a weight is first used.
#pragma once
#include "convolution.h"
#include "k_blocked.h"

struct GroupCols {
  int64_t outputs, columns;
  int64_t rows;  // of a group
  const float* values;
  const int32_t* counts;  // [groups]: columns that a group keeps
  const int32_t* steps;   // [kept]
  int64_t first;
  int64_t groups, whole;  // how many there are, and how many of them have all their rows
  // The same by blocks of whole channels, columns as uint16_t; outputs that the groups leave over share a group there.
  const KBlocked* blocked;
  const float* biases;  // [outputs]
};

// What is divided among threads: as many outputs as are sorted together. Where the groups of a unit begin.
static inline int64_t units_of(const GroupCols* weight) {
  return (weight->outputs + CHUNK - 1) / CHUNK;
}

static inline int64_t group_of(const GroupCols* weight, int64_t unit) {
  return unit * CHUNK < weight->outputs ? unit * (CHUNK / weight->rows) : weight->groups;
}

// The weight of a convolution, or with one tap of a product with columns of pixels. An item is some rows of the outcome
// of one picture, or some of its pixels, of some groups; the last axis varies fastest.
static inline const GroupCols* group_cols_of(const Convolution* call) {
  return static_cast<const GroupCols*>(call->weight);
}

// An item with groups in place of units.
static inline ConvolutionItem group_cols_item(const Convolution* call, int64_t number) {
  const GroupCols* const weight = group_cols_of(call);
  ConvolutionItem item = convolution_item(call, number, units_of(weight));
  item.begin = group_of(weight, item.begin);
  item.end = group_of(weight, item.end);
  return item;
}

// One item of a convolution, and one row of x for groups [begin, end), whatever is in the inputs.
extern "C" void group_cols_item_f32(const Convolution* call, int64_t item);
extern "C" void group_cols_row_f32(const Matmul* call, int64_t begin, int64_t end, int64_t row);
