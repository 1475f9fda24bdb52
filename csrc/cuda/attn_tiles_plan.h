#pragma once

#include "args/attn_tiles.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

// One block: the list is a counting sort, and its bins live in that block's shared memory.
constexpr int kTileBins = 66;
inline LaunchPlan plan_attn_tiles(const AttnTilesArgs&) { return {1, 256, 2 * kTileBins * 4}; }

}  // namespace cuda
}  // namespace filbert
