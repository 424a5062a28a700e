// Reading memory and nothing else: the limit that every kernel with large weights is held against.
#pragma once
#include "kernels.h"

struct Memory {
  const void* data;
  int64_t bytes;
};
