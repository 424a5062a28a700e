#define LANES 8
#include "decoder_vectors.h"

VARIANT(normalize, avx2)
VARIANT(rotate, avx2)
VARIANT(attend, avx2)
