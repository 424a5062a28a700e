// The oracles: sums are of doubles.
#include "decoder.h"

#include <math.h>

#include "numbers.h"

namespace {

template <class T>
float rounded(float value) {
  T found;
  narrow(value, &found);
  return widen(found);
}

template <class T>
void normalize(const void* pointer, int64_t begin, int64_t end) {
  const Normalize& call = *static_cast<const Normalize*>(pointer);
  const int64_t width = call.width;
  const T* const weight = static_cast<const T*>(call.weight);
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(call.x) + row * width;
    if (call.more) {
      const T* const more = static_cast<const T*>(call.more) + row * width;
      T* const sum = static_cast<T*>(call.sum) + row * width;
      for (int64_t i = 0; i < width; i++) narrow(widen(x[i]) + widen(more[i]), sum + i);
      x = sum;
    }
    if (!weight) continue;
    double squares = 0;
    for (int64_t i = 0; i < width; i++) squares += double(widen(x[i])) * widen(x[i]);
    const float scale = 1 / sqrtf(float(squares / double(width)) + call.epsilon);
    T* const y = static_cast<T*>(call.y) + row * width;
    for (int64_t i = 0; i < width; i++) narrow(rounded<T>(widen(x[i]) * scale) * widen(weight[i]), y + i);
  }
}

template <class T>
void rotate(const void* pointer, int64_t begin, int64_t end) {
  const Rotate& call = *static_cast<const Rotate*>(pointer);
  const int64_t half = call.width / 2;
  for (int64_t text = begin; text < end; text++) {
    const T* const cos = static_cast<const T*>(call.cos) + text * call.apart;
    const T* const sin = static_cast<const T*>(call.sin) + text * call.apart;
    T* x = static_cast<T*>(call.x) + text * call.heads * call.width;
    for (int64_t head = 0; head < call.heads; head++, x += call.width)
      for (int64_t i = 0; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        narrow(rounded<T>(a * widen(cos[i])) + rounded<T>(-b * widen(sin[i])), x + i);
        narrow(rounded<T>(b * widen(cos[i + half])) + rounded<T>(a * widen(sin[i + half])), x + i + half);
      }
  }
}

template <class T>
void attend(const void* pointer, int64_t begin, int64_t end) {
  const Attend& call = *static_cast<const Attend*>(pointer);
  const int64_t width = call.width, tokens = call.tokens;
  double* const weight = static_cast<double*>(scratch(size_t(tokens + 1) * sizeof(double)));
  for (int64_t item = begin; item < end; item++) {
    const int64_t text = item / call.heads, head = item % call.heads;
    const T* const keys = static_cast<const T*>(call.keys) + text * call.keys_text + head * call.keys_head;
    const T* const values = static_cast<const T*>(call.values) + text * call.values_text + head * call.values_head;
    const T* const new_key = static_cast<const T*>(call.new_keys) + item * width;
    const T* const new_value = static_cast<const T*>(call.new_values) + item * width;
    const float* const bias = call.bias ? call.bias + text * (tokens + 1) : nullptr;
    for (int64_t member = 0; member < call.group; member++) {
      const T* const query = static_cast<const T*>(call.query) + (item * call.group + member) * width;
      T* const out = static_cast<T*>(call.out) + (item * call.group + member) * width;
      double most = -INFINITY, whole = 0;
      for (int64_t token = 0; token <= tokens; token++) {
        const T* const key = token < tokens ? keys + token * width : new_key;
        double score = 0;
        for (int64_t i = 0; i < width; i++) score += double(widen(query[i])) * widen(key[i]);
        weight[token] = score * call.scaling + (bias ? bias[token] : 0);
        if (!(weight[token] <= most)) most = weight[token];
      }
      if (most == -INFINITY) most = 0;  // a token that may see nothing gets nothing
      for (int64_t token = 0; token <= tokens; token++) whole += weight[token] = exp(weight[token] - most);
      for (int64_t i = 0; i < width; i++) {
        double sum = weight[tokens] * widen(new_value[i]);
        for (int64_t token = 0; token < tokens; token++) sum += weight[token] * widen(values[token * width + i]);
        narrow(whole == 0 ? 0 : float(sum / whole), out + i);
      }
    }
    append<T>(call, item);
  }
}

template <class T>
void append_all(const void* pointer, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; item++) append<T>(*static_cast<const Attend*>(pointer), item);
}

}  // namespace

extern "C" void normalize_f32_base(const void* call, int64_t begin, int64_t end) { normalize<float>(call, begin, end); }
extern "C" void normalize_bf16_base(const void* call, int64_t begin, int64_t end) { normalize<bf16>(call, begin, end); }
extern "C" void rotate_f32_base(const void* call, int64_t begin, int64_t end) { rotate<float>(call, begin, end); }
extern "C" void rotate_bf16_base(const void* call, int64_t begin, int64_t end) { rotate<bf16>(call, begin, end); }
extern "C" void attend_f32_base(const void* call, int64_t begin, int64_t end) { attend<float>(call, begin, end); }
extern "C" void attend_bf16_base(const void* call, int64_t begin, int64_t end) { attend<bf16>(call, begin, end); }
extern "C" void append_f32_base(const void* call, int64_t begin, int64_t end) { append_all<float>(call, begin, end); }
extern "C" void append_bf16_base(const void* call, int64_t begin, int64_t end) { append_all<bf16>(call, begin, end); }
