// A convolution of pictures, whatever its weight is packed as, and the items it is cut into: some rows of the outcome of
// one picture, of some units of the weight. A unit is what its format stores in one piece, and the last axis varies
// fastest.
#pragma once
#include "kernels.h"

struct Convolution {
  const void* weight;  // the struct of its format
  const float* x;      // [pictures, channels, height, width]
  float* y;            // [pictures, outputs, out_height, out_width]
  int64_t pictures, channels, height, width, out_height, out_width;
  int64_t taps_high, taps_wide, stride_high, stride_wide, pad_high, pad_wide, apart_high, apart_wide;
  int64_t chunk;          // rows of the outcome in an item; with one tap, no stride and no padding, pixels
  int64_t chunks, parts;  // how many items a picture has, and into how many parts the units are divided
  float low, high;        // what the outcome is held between
};

struct ConvolutionItem {
  int64_t picture, chunk, begin, end;  // units [begin, end)
};

static inline struct ConvolutionItem convolution_item(const Convolution* call, int64_t item, int64_t units) {
  const int64_t part = item % call->parts, rest = item / call->parts;
  ConvolutionItem found = {rest / call->chunks, rest % call->chunks, units * part / call->parts,
                           units * (part + 1) / call->parts};
  return found;
}

static inline bool of_pixels(const Convolution* call) {
  return call->taps_high * call->taps_wide == 1 && call->stride_high * call->stride_wide == 1 &&
         call->pad_high + call->pad_wide == 0;
}

// What a tap sees of a channel at a place of the outcome: zero beyond the picture.
static inline float seen(const Convolution* call, const float* channel, int64_t tap, int64_t high, int64_t wide) {
  const int64_t row = high * call->stride_high - call->pad_high + tap / call->taps_wide * call->apart_high;
  const int64_t at = wide * call->stride_wide - call->pad_wide + tap % call->taps_wide * call->apart_wide;
  return row < 0 || row >= call->height || at < 0 || at >= call->width ? 0 : channel[row * call->width + at];
}

static inline float held(float value, float low, float high) { return value < low ? low : value > high ? high : value; }
