#define LANES 16
#include "decoder_vectors.h"

VARIANT(normalize, avx512)
VARIANT(rotate, avx512)
VARIANT(attend, avx512)
