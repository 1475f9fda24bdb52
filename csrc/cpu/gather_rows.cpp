#include "args/gather_rows.h"

#include <cstring>

#include "cpu/threads/tasks.h"

namespace filbert {

// Nothing to vectorise: memcpy knows the processor.
void gather_rows_cpu(const GatherRowsArgs& args) {
  for_rows(args.rows, args.row_bytes, [&](int64_t begin, int64_t end) {
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
