// Convolutions that follow one another, gone through by a few pictures at a time, so that what lies between them stays in
// the second cache: memory would be written and read for each layer, once all pictures went through the one before it.
// An item is so many pictures. What only these layers read lies in a room of the thread that computes it.
#pragma once
#include "convolution.h"

enum { READ, MADE, ADDED, VALUES };  // x, y and more

struct StretchStep {
  Kernel* kernel;
  const Convolution* call;  // for as many pictures as go together
  // Floats from one picture of x, y and more to the next, 0 of what lies in rooms, and from one room to the next.
  int64_t apart[VALUES], rooms[VALUES];
};

struct Stretch {
  const StretchStep* steps;
  int64_t count, pictures, together;
  uint64_t taken;  // a bit for each room in use: there are as many as threads
};
