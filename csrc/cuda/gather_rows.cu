// Which kernel a call of gather_rows runs: the largest unit that its rows allow.
#include "cuda/gather_rows.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename Unit>
bool fits(const GatherRowsArgs& args) {
  const auto bits = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.out) |
                    static_cast<uintptr_t>(args.row_bytes) |
                    static_cast<uintptr_t>(args.x_row_stride);
  return bits % sizeof(Unit) == 0;
}

}  // namespace
}  // namespace cuda

void gather_rows_cuda(const GatherRowsArgs& args, void* stream) {
  using namespace cuda;
  const LaunchPlan plan =
      plan_strided(args.rows, kGatherWarps, 32 * kGatherWarps, multiprocessors());
  constexpr const char* kName = "gather_rows";
  if (fits<uint4>(args)) return launch(kName, gather_rows_kernel<uint4>, plan, stream, args);
  if (fits<uint32_t>(args)) return launch(kName, gather_rows_kernel<uint32_t>, plan, stream, args);
  if (fits<uint16_t>(args)) return launch(kName, gather_rows_kernel<uint16_t>, plan, stream, args);
  launch(kName, gather_rows_kernel<uint8_t>, plan, stream, args);
}

}  // namespace filbert
