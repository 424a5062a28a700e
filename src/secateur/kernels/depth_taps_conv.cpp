// The oracle: one place of the outcome at a time, a tap that is not kept being a weight of zero, so that what is not
// finite makes NaN of it, as in a dense convolution.
#include "depth_taps.h"

extern "C" void depth_taps_item_f32(const Convolution* call, int64_t item) {
  const DepthTaps& weight = *depth_taps_of(call);
  const ConvolutionItem at = convolution_item(call, item, weight.channels);
  const int64_t size = call->out_height * call->out_width;
  const int64_t first = at.chunk * call->chunk * call->out_width, last = first + call->chunk * call->out_width;
  for (int64_t channel = at.begin; channel < at.end; channel++) {
    const float* x = x_of(call, at.picture, channel);
    float* y = y_of(call, weight.channels, at.picture, channel);
    const float* more = call->more ? more_of(call, weight.channels, at.picture, channel) : nullptr;
    const uint64_t shape = uint64_t(weight.shapes[weight.which[channel]]);
    for (int64_t pixel = first; pixel < last && pixel < size; pixel++) {
      const int64_t high = pixel / call->out_width, wide = pixel % call->out_width;
      const float* value = weight.values + weight.begins[channel];
      float sum = *value++;
      for (int64_t tap = 0; tap < weight.taps; tap++) {
        const float kept = shape >> tap & 1 ? *value++ : 0;
        sum += kept * seen(call, x, tap, high, wide);
      }
      y[high * call->y_row + wide] = held(more ? sum + more[more_at(call, high, wide)] : sum, call->low, call->high);
    }
  }
}

extern "C" void depth_taps_conv_f32_base(const void* call, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; item++) depth_taps_item_f32(static_cast<const Convolution*>(call), item);
}
