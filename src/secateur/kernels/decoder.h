// What a block of a decoder does between its products for one new token of each text (formats/decoder.py). What torch
// rounds is rounded here: of 16 bits each sum and product, as transformers writes them.
#pragma once
#include "kernels.h"

// The root mean square norm of rows, of a sum where there is one: y = weight x / sqrt(mean x^2 + epsilon). An item is a row.
struct Normalize {
  const void* x;       // [rows, width]
  const void* more;    // likewise, added to x, or null
  void* sum;           // likewise: where the sum goes, if there is one; it may be x or more
  const void* weight;  // [width], or null: nothing but the sum is asked for
  void* y;             // [rows, width], and may be x
  int64_t rows, width;
  float epsilon;
};

// Heads turned by an angle for each pair of channels, which lie half a head apart. An item is a text.
struct Rotate {
  void* x;          // [texts, heads, width]
  const void* cos;  // [texts, width]
  const void* sin;  // likewise
  int64_t heads, width;
  int64_t apart;  // numbers from one text's angles to the next, or 0: all have the same
};

// The attention of a token to those before it and to itself. An item is a head of keys of one text.
struct Attend {
  const void* query;       // [texts, heads, group, width]
  void* keys;              // of the tokens before it: [texts, heads, tokens, width], texts and heads being so far apart
  void* values;            // likewise
  const void* new_keys;    // [texts, heads, width]
  const void* new_values;  // likewise
  const float* bias;       // [texts, tokens + 1], added to the scores, or null
  void* out;               // [texts, heads, group, width]
  int64_t tokens, keys_text, keys_head, values_text, values_head;
  int64_t grows;  // whether there is room behind them, where the new ones go
  int64_t heads, group, width;
  float scaling;
};

// The new key and value of an item behind those before them; by itself, `append`, where something else attends.
template <class T>
static inline void append(const Attend& call, int64_t item) {
  if (!call.grows) return;
  const int64_t text = item / call.heads, head = item % call.heads, behind = call.tokens * call.width;
  T* const key = static_cast<T*>(call.keys) + text * call.keys_text + head * call.keys_head + behind;
  T* const value = static_cast<T*>(call.values) + text * call.values_text + head * call.values_head + behind;
  for (int64_t i = 0; i < call.width; i++) {
    key[i] = static_cast<const T*>(call.new_keys)[item * call.width + i];
    value[i] = static_cast<const T*>(call.new_values)[item * call.width + i];
  }
}
