// The variants, in vectors of LANES floats: one source for every processor. A lane is a row of x.
//
// A tile is as many rows as V vectors hold. Of one block of inputs it is laid out as a panel, input after input, and each
// four of outputs adds what it keeps of the block to its sums, which wait in the second cache between blocks.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "fours.h"

namespace {

enum {
  NEAR = 8192,                 // floats of a panel, which stays in the first cache
  AT_ONCE = 4096 / CHUNK,      // chunks whose sums stay in the second
  READ = 8                     // rows read side by side: more, far apart, would push one another out of the cache
};

void scalar(const Matmul& call, int64_t chunk, int64_t row, float) { k_blocked_row_f32(&call, chunk, row); }
void scalar(const Matmul& call, int64_t chunk, int64_t row, bf16) { k_blocked_row_bf16(&call, chunk, row); }
void scalar(const Matmul& call, int64_t chunk, int64_t row, f16) { k_blocked_row_f16(&call, chunk, row); }

// What chunks [begin, end) add to their sums for one block.
template <class T, int V>
void add(const KBlocked& weight, int64_t block, int64_t begin, int64_t end, const float* panel, float* sums) {
  enum { WIDE = V * LANES };
  const int32_t* rows = weight.rows + block * weight.padded;
  const int64_t* offsets = weight.offsets + block * (weight.padded / ABREAST);
  const int64_t first = begin * CHUNK, last = least(end * CHUNK, weight.padded);
  for (int64_t place = first; place < last; place += ABREAST) {
    int64_t step = offsets[place / ABREAST];
    const int64_t until = offsets[place / ABREAST + 1];
    if (step == until) continue;
    float* to[ABREAST];
    Vector sum[ABREAST][V];
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST; i++) {
      to[i] = sums + (rows[place + i] - first) * WIDE;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] = load(to[i] + v * LANES);
    }
    const uint8_t* columns = static_cast<const uint8_t*>(weight.columns) + step * ABREAST;
    const T* values = static_cast<const T*>(weight.values) + step * ABREAST;
    for (; step < until; step++, columns += ABREAST, values += ABREAST)
#pragma GCC unroll 4
      for (int i = 0; i < ABREAST; i++) {
        const float* from = panel + int64_t(columns[i]) * WIDE;
        const Vector value = all(widen(values[i]));
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] += load(from + v * LANES) * value;
      }
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(to[i] + v * LANES, sum[i][v]);
  }
}

// Rows [row, row + count) of x, all finite or computed again later, for chunks [begin, end).
template <class T, int V>
void tile(const Matmul& call, const KBlocked& weight, int64_t begin, int64_t end, int64_t row, int64_t count,
          float* panel, float* sums) {
  enum { WIDE = V * LANES };
  const int64_t first = begin * CHUNK, outputs = least(end * CHUNK, weight.padded) - first;
  const T* const bias = static_cast<const T*>(call.bias);
  for (int64_t i = 0; i < outputs; i++) {
    const float value = bias && first + i < weight.outputs ? widen(bias[first + i]) : 0.0f;
    for (int v = 0; v < V; v++) store(sums + i * WIDE + v * LANES, all(value));
  }
  for (int64_t block = 0; block * weight.depth < weight.inputs; block++) {
    const int64_t start = block * weight.depth, deep = least(weight.depth, weight.inputs - start);
    if (count < WIDE) clear(panel, deep * WIDE);
    for (int64_t i = 0; i < count; i += READ) {
      const T* from = static_cast<const T*>(call.x) + (row + i) * weight.inputs + start;
      const int64_t some = least(READ, count - i);
      if (some == READ)
        for (int64_t k = 0; k < deep; k++)
#pragma GCC unroll 8
          for (int j = 0; j < READ; j++) panel[k * WIDE + i + j] = widen(from[j * weight.inputs + k]);
      else
        for (int64_t j = 0; j < some; j++)
          for (int64_t k = 0; k < deep; k++) panel[k * WIDE + i + j] = widen(from[j * weight.inputs + k]);
    }
    add<T, V>(weight, block, begin, end, panel, sums);
  }
  T* const y = static_cast<T*>(call.y) + row * weight.outputs + first;
  const int64_t real = least(outputs, weight.outputs - first);
  for (int64_t from = 0; from < real; from += LANES)  // so many that their sums come once into the first cache
    for (int64_t i = 0; i < count; i++)
      for (int64_t output = from; output < least(from + LANES, real); output++)
        narrow(sums[output * WIDE + i], y + i * weight.outputs + output);
}

// As many vectors as the rows that are left need, and as a panel holds.
template <class T, int V>
int64_t widest(const Matmul& call, const KBlocked& weight, int64_t begin, int64_t end, int64_t row, float* panel,
               float* sums) {
  const int64_t left = call.rows - row;
  if constexpr (V > 1)
    if (left <= (V - 1) * LANES || weight.depth * V * LANES > NEAR)
      return widest<T, V - 1>(call, weight, begin, end, row, panel, sums);
  const int64_t count = least(left, V * LANES);
  tile<T, V>(call, weight, begin, end, row, count, panel, sums);
  return count;
}

template <class T>
bool finite(const T* x, int64_t count) {
  uint32_t wild = 0;
  for (int64_t i = 0; i < count; i++) wild |= (bits_of_float(widen(x[i])) & 0x7f800000) == 0x7f800000;
  return !wild;
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const KBlocked& weight = *static_cast<const KBlocked*>(call.weight);
  float* const panel = static_cast<float*>(scratch((NEAR + int64_t(AT_ONCE) * CHUNK * most(1) * LANES) * sizeof(float)));
  for (; begin < end; begin += AT_ONCE) {
    const int64_t until = least(begin + AT_ONCE, end);
    for (int64_t row = 0; row < call.rows;)
      row += widest<T, most(1)>(call, weight, begin, until, row, panel, panel + NEAR);
    for (int64_t row = 0; row < call.rows; row++)
      if (!finite(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs))
        for (int64_t chunk = begin; chunk < until; chunk++) scalar(call, chunk, row, T());
  }
}

}  // namespace
