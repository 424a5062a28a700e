// Groups of outputs that keep the same columns, as a stream: for each group its biases, then for each column it keeps
// a weight of every output of the group. A column is an input, or an input and a tap of a convolution. Outputs left
// over by the groups follow one by one.
//
// The stream says where a column is by the step from the one before it, over all groups, and its last step leads back
// to the first. That is what the oracle follows. The variants go through the inputs slice by slice, so that what they
// read of them stays in the nearest cache, and need for that where a group is in a slice: `at` and `begins`, laid out
// from the steps when a weight is first used. Groups of one are laid out by fours as well, with a byte for a column of
// its block, for variants that are faster so: a block holds whole channels.
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
  int64_t slice, slices;  // columns in a slice, and how many slices there are; several may be gone through at once
  const int32_t* at;      // [kept]: the column
  const int32_t* begins;  // [slices + 1, groups]: the first column in the stream that a group keeps of a slice
  const KBlocked* fours;  // of groups of one, or null
  const float* biases;    // beside it, [outputs rounded up to a multiple of four]
};

// What is divided among threads: groups, or of those that lie in blocks as many as are sorted together.
static inline int64_t units_of(const GroupCols* weight) {
  return weight->fours ? (weight->outputs + CHUNK - 1) / CHUNK : weight->groups;
}

static inline int64_t group_of(const GroupCols* weight, int64_t unit) {
  if (!weight->fours) return unit;
  return unit * CHUNK < weight->outputs ? unit * (CHUNK / weight->rows) : weight->groups;
}

// The weight of a convolution, or with one tap of a product with columns of pixels. An item is some rows of the outcome
// of one picture, or some of its pixels, of some groups; the last axis varies fastest.
static inline const GroupCols* group_cols_of(const Convolution* call) {
  return static_cast<const GroupCols*>(call->weight);
}

// Where the values of a group begin, its biases first, when `before` columns are kept by the groups before it.
static inline const float* values_of(const GroupCols* weight, int64_t group, int64_t before) {
  const int64_t tail = weight->begins[weight->whole < weight->groups ? weight->whole : 0];
  if (group <= weight->whole) return weight->values + (group + before) * weight->rows;
  return weight->values + (weight->whole + tail) * weight->rows + (group - weight->whole) + (before - tail);
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
