#include "args/gather_rows.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {

// Nothing to vectorise: memcpy knows the processor.
void gather_rows_cpu(const GatherRowsArgs& args) {
  constexpr int64_t kBytesPerShare = 65536;  // a few microseconds of work
  const int64_t grain = std::max<int64_t>(1, kBytesPerShare / args.row_bytes);
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* to = static_cast<char*>(args.out) + r * args.row_bytes;
      const int64_t source = args.index[r];
      if (source >= 0 && source < args.x_rows) {
        std::memcpy(to, static_cast<const char*>(args.x) + source * args.x_row_stride,
                    args.row_bytes);
      } else {
        std::memset(to, 0, args.row_bytes);
      }
    }
  });
}

}  // namespace filbert
