// The oracle: sums are of doubles.
#include "mean_linear.h"

extern "C" void mean_linear_f32_base(const void* pointer, int64_t begin, int64_t end) {
  const MeanLinear& call = *static_cast<const MeanLinear*>(pointer);
  double* const means = static_cast<double*>(scratch(size_t(call.channels) * sizeof(double)));
  for (int64_t picture = begin; picture < end; picture++) {
    for (int64_t channel = 0; channel < call.channels; channel++) {
      const float* x = call.x + (picture * call.channels + channel) * call.plane;
      double sum = 0;
      for (int64_t high = 0; high < call.height; high++)
        for (int64_t wide = 0; wide < call.width; wide++) sum += x[high * call.row + wide];
      means[channel] = sum / double(call.height * call.width);
    }
    for (int64_t output = 0; output < call.outputs; output++) {
      double sum = call.bias ? call.bias[output] : 0;
      for (int64_t channel = 0; channel < call.channels; channel++)
        sum += means[channel] * call.weight[output * call.channels + channel];
      call.y[picture * call.outputs + output] = float(sum);
    }
  }
}
