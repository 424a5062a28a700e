// The oracle: every score, then the softmax, then the sum, as the formula is written.
#include <cmath>

#include "bitmap_kv.h"
#include "numbers.h"

namespace {

template <class T>
void scores_of(const BitmapKV& call, int64_t item, const T* query, float* score) {
  const uint32_t* bits = call.key_bits + item * call.room * call.width;
  const int64_t packed = call.tiles * TILE;
  for (int64_t tile = 0; tile < call.tiles; tile++) {
    const T* value = static_cast<const T*>(call.key_values) + (item * call.room + tile) * call.key_kept;
    for (int token = 0; token < TILE; token++) score[tile * TILE + token] = 0;
    for (int64_t channel = 0; channel < call.width; channel++)
      for (int token = 0; token < TILE; token++)
        if (bits[tile * call.width + channel] >> token & 1)
          score[tile * TILE + token] += widen(*value++) * widen(query[channel]);
  }
  const T* keys = static_cast<const T*>(call.keys) + item * call.tail_room * call.width;
  for (int64_t token = 0; token < call.tail; token++) {
    float sum = 0;
    for (int64_t channel = 0; channel < call.width; channel++)
      sum += widen(keys[token * call.width + channel]) * widen(query[channel]);
    score[packed + token] = sum;
  }
}

template <class T>
void add_values(const BitmapKV& call, int64_t item, const float* weight, float* sum) {
  const int64_t words = (call.width + 31) / 32, packed = call.tiles * TILE;
  const uint32_t* bits = call.value_bits + item * call.room * TILE * words;
  for (int64_t tile = 0; tile < call.tiles; tile++) {
    const T* value = static_cast<const T*>(call.value_values) + (item * call.room + tile) * call.value_kept;
    for (int64_t token = tile * TILE; token < (tile + 1) * TILE; token++)
      for (int64_t channel = 0; channel < call.width; channel++)
        if (bits[token * words + channel / 32] >> (channel % 32) & 1) sum[channel] += weight[token] * widen(*value++);
  }
  const T* values = static_cast<const T*>(call.values) + item * call.tail_room * call.width;
  for (int64_t token = 0; token < call.tail; token++)
    for (int64_t channel = 0; channel < call.width; channel++)
      sum[channel] += weight[packed + token] * widen(values[token * call.width + channel]);
}

template <class T>
void attend(const void* pointer, int64_t begin, int64_t end) {
  const BitmapKV& call = *static_cast<const BitmapKV*>(pointer);
  const int64_t tokens = call.tiles * TILE + call.tail;
  float* const weight = static_cast<float*>(scratch((tokens + call.width) * sizeof(float)));
  float* const sum = weight + tokens;
  for (int64_t item = begin; item < end; item++)
    for (int64_t member = 0; member < call.group; member++) {
      const int64_t row = item * call.group + member;
      scores_of(call, item, static_cast<const T*>(call.query) + row * call.width, weight);
      const float* const bias = call.bias ? call.bias + item / call.heads * tokens : nullptr;
      float most = -INFINITY;
      for (int64_t token = 0; token < tokens; token++) {
        weight[token] = weight[token] * call.scaling + (bias ? bias[token] : 0);
        if (!(weight[token] <= most)) most = weight[token];  // a NaN stays one
      }
      float whole = 0;
      for (int64_t token = 0; token < tokens; token++) {
        weight[token] = most == -INFINITY ? 0 : std::exp(weight[token] - most);
        whole += weight[token];
      }
      for (int64_t channel = 0; channel < call.width; channel++) sum[channel] = 0;
      add_values<T>(call, item, weight, sum);
      T* const out = static_cast<T*>(call.out) + row * call.width;
      for (int64_t channel = 0; channel < call.width; channel++)  // a row of padding attends to nothing
        narrow(whole == 0 ? 0.0f : sum[channel] / whole, out + channel);
    }
}

}  // namespace

extern "C" void bitmap_kv_attend_f32_base(const void* call, int64_t begin, int64_t end) {
  attend<float>(call, begin, end);
}

extern "C" void bitmap_kv_attend_bf16_base(const void* call, int64_t begin, int64_t end) {
  attend<bf16>(call, begin, end);
}

extern "C" void bitmap_kv_attend_f16_base(const void* call, int64_t begin, int64_t end) {
  attend<f16>(call, begin, end);
}
