// The variants, in vectors of LANES floats: one source for every processor.
#pragma once
#include "mean_linear.h"
#include "vectors.h"

namespace {

inline float sum_of(Vector sums) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
  return sum;
}

[[maybe_unused]] void mean_linear(const void* pointer, int64_t begin, int64_t end) {
  const MeanLinear& call = *static_cast<const MeanLinear*>(pointer);
  const int64_t channels = call.channels, width = call.width;
  float* const means = static_cast<float*>(scratch(size_t(channels) * sizeof(float)));
  for (int64_t picture = begin; picture < end; picture++) {
    for (int64_t channel = 0; channel < channels; channel++) {
      const float* row = call.x + (picture * channels + channel) * call.plane;
      Vector sums = {};
      float rest[4] = {};  // several sums, that none waits for the one before it
      for (int64_t high = 0; high < call.height; high++, row += call.row) {
        int64_t wide = 0;
        for (; wide + LANES <= width; wide += LANES) sums += load(row + wide);
        for (; wide + 4 <= width; wide += 4)
          for (int i = 0; i < 4; i++) rest[i] += row[wide + i];
        for (; wide < width; wide++) rest[0] += row[wide];
      }
      const float sum = sum_of(sums) + ((rest[0] + rest[1]) + (rest[2] + rest[3]));
      means[channel] = sum / float(call.height * width);
    }
    for (int64_t output = 0; output < call.outputs; output++) {
      const float* weight = call.weight + output * channels;
      Vector sums = {};
      int64_t channel = 0;
      for (; channel + LANES <= channels; channel += LANES) sums += load(means + channel) * load(weight + channel);
      float sum = sum_of(sums);
      for (; channel < channels; channel++) sum += means[channel] * weight[channel];
      call.y[picture * call.outputs + output] = sum + (call.bias ? call.bias[output] : 0);
    }
  }
}

}  // namespace
