// The oracle: the stream is followed by its steps, for one pixel, or one row of x, at a time. An outcome is NaN where a
// zero of its output meets something that is not finite, as in a dense product.
#include "group_cols.h"

#include "finite.h"

namespace {

// The outcome of groups [begin, end), for the inputs that `in` gives by their column.
template <class In, class Out>
void follow(const GroupCols& weight, int64_t begin, int64_t end, const In& in, const Out& out) {
  int64_t wild = 0;
  for (int64_t column = 0; column < weight.columns; column++) wild += !finite(in(column));
  const float* values = weight.values;
  const int32_t* step = weight.steps;
  int64_t column = weight.first;
  for (int64_t group = 0; group < weight.groups; group++) {
    const int64_t rows = group < weight.whole ? weight.rows : 1, kept = weight.counts[group];
    const int64_t output = group < weight.whole ? group * rows : weight.whole * weight.rows + group - weight.whole;
    const int64_t start = column;
    for (int64_t row = 0; row < rows && group >= begin && group < end; row++) {
      float sum = values[row];
      int64_t met = 0;
      column = start;
      for (int64_t k = 0; k < kept; k++) {
        const float x = in(column);
        sum += values[(k + 1) * rows + row] * x;
        met += !finite(x);
        column += step[k];
      }
      out(output + row, met < wild ? float_of_bits(0x7fc00000) : sum);
    }
    column = start;
    for (int64_t k = 0; k < kept; k++) column += step[k];
    values += (kept + 1) * rows;
    step += kept;
  }
}

}  // namespace

extern "C" void group_cols_item_f32(const Convolution* pointer, int64_t item) {
  const Convolution& call = *pointer;
  const GroupCols& weight = *group_cols_of(pointer);
  const ConvolutionItem at = group_cols_item(pointer, item);
  const int64_t taps = call.taps_high * call.taps_wide, size = call.out_height * call.out_width;
  const int64_t unit = of_pixels(pointer) ? 1 : call.out_width;
  const int64_t first = at.chunk * call.chunk * unit, last = first + call.chunk * unit;
  for (int64_t pixel = first; pixel < last && pixel < size; pixel++) {
    const int64_t high = pixel / call.out_width, wide = pixel % call.out_width;
    follow(
        weight, at.begin, at.end,
        [&](int64_t column) {
          return seen(pointer, x_of(pointer, at.picture, column / taps), column % taps, high, wide);
        },
        [&](int64_t output, float value) {
          const float* more = call.more ? more_of(pointer, weight.outputs, at.picture, output) : nullptr;
          if (more) value += more[more_at(pointer, high, wide)];
          y_of(pointer, weight.outputs, at.picture, output)[high * call.y_row + wide] = held(value, call.low, call.high);
        });
  }
}

extern "C" void group_cols_row_f32(const Matmul* call, int64_t begin, int64_t end, int64_t row) {
  const GroupCols& weight = *static_cast<const GroupCols*>(call->weight);
  const float* x = static_cast<const float*>(call->x) + row * weight.columns;
  const float* bias = static_cast<const float*>(call->bias);
  float* y = static_cast<float*>(call->y) + row * weight.outputs;
  follow(
      weight, begin, end, [&](int64_t column) { return x[column]; },
      [&](int64_t output, float value) { y[output] = bias ? value + bias[output] : value; });
}

extern "C" void group_cols_conv_f32_base(const void* call, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; item++)
    group_cols_item_f32(static_cast<const Convolution*>(call), item);
}

extern "C" void group_cols_matmul_f32_base(const void* pointer, int64_t begin, int64_t end) {
  const Matmul* call = static_cast<const Matmul*>(pointer);
  const GroupCols* weight = static_cast<const GroupCols*>(call->weight);
  const int64_t first = group_of(weight, begin), last = group_of(weight, end);
  for (int64_t row = 0; row < call->rows; row++) group_cols_row_f32(call, first, last, row);
}
