// The faulty copy's kernel files are compiled with this in front, and so take these macros for the
// functions of the vector layer with the same names.
#pragma once

#include "cpu/simd/bits.h"
#include "planted.h"

#define PLANTED(fault) (kernel_check::planted == kernel_check::fault)
#define popcount(...) popcount((__VA_ARGS__) & (PLANTED(kLostBit) ? 0x7fffffffu : ~0u))
#define word_of(...) (word_of(__VA_ARGS__) & (PLANTED(kLostLane) ? ~1u : ~0u))
#define store_first(p, v, n) store_first(p, v, (n) - PLANTED(kShortTail))
#define load_first(p, n) (PLANTED(kWideTail) ? load(p) : load_first(p, n))
#define reduce_add(v) (reduce_add(v) * (PLANTED(kLargeSum) ? 1.00001f : 1.0f))
#define exp_nonpositive(v) (exp_nonpositive(v) * (PLANTED(kLargeExp) ? 1.00001f : 1.0f))
