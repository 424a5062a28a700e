// The oracle.
#include "product.h"

namespace {

template <class T>
float at(const Strided& matrix, int64_t row, int64_t k) {
  return widen(static_cast<const T*>(matrix.data)[row * matrix.apart + k * matrix.step]);
}

template <class T>
void multiply(const Product& call, int64_t begin, int64_t end) {
  const int64_t last = end * ROWS_OF_AN_ITEM < call.rows ? end * ROWS_OF_AN_ITEM : call.rows;
  for (int64_t i = begin * ROWS_OF_AN_ITEM; i < last; i++)
    for (int64_t j = 0; j < call.columns && (!call.lower || j <= i); j++) {
      float sum = 0;
      for (int64_t k = 0; k < call.depth; k++) sum += at<T>(call.left, i, k) * at<T>(call.right, j, k);
      float& to = call.to[i * call.apart + j];
      to = (call.fresh ? 0 : to) + call.scale * sum;
    }
}

}  // namespace

extern "C" void product_f32_base(const void* call, int64_t begin, int64_t end) {
  multiply<float>(*static_cast<const Product*>(call), begin, end);
}

extern "C" void product_bf16_base(const void* call, int64_t begin, int64_t end) {
  multiply<bf16>(*static_cast<const Product*>(call), begin, end);
}
