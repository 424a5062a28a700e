#define LANES 4
#include "decoder_vectors.h"

VARIANT(normalize, neon)
VARIANT(rotate, neon)
VARIANT(attend, neon)
