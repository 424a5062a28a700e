// Threads that help the caller, which never waits for one that has not begun.
#pragma once
#include "kernels.h"

// Run a kernel over [0, items) with up to `threads` threads, the caller among them.
void parallel(Kernel* kernel, const void* call, int64_t items, int threads);
