// Pretended device memory. Each operand of a call is copied between pages that nobody may touch, so
// that a kernel that leaves its operand faults; what is only read may not be written; what is to be
// filled starts as NaN. Of a strided operand only the elements are copied: the gaps, which belong
// to other tensors, hold a pattern that must not change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace hostcuda {

// A strided tensor: `sizes.size()` dimensions, strides in elements.
struct View {
  void* home;
  size_t element;  // bytes
  std::vector<int64_t> sizes, strides;

  // Bytes from the first element to the end of the last.
  size_t extent() const;
  // Calls body(byte offset, bytes) for runs of elements that lie side by side.
  void for_runs(const std::function<void(size_t, size_t)>& body) const;
};

class Operands {
 public:
  Operands() = default;
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;
  ~Operands();

  const void* read(const View& view);
  void* write(const View& view);
  void* update(const View& view);

  // Checks the margins of every operand and the gaps in it, and copies back what was written.
  void finish();

  // Where `address` lies, in words, as seen from the operands that are alive.
  static std::string describe(const void* address);
  // Whether [address, address + bytes) lies within one of them, or none is alive to compare with.
  static bool holds(const void* address, size_t bytes);

 private:
  struct Operand {
    int number;  // in the order of the call
    char* map;   // all of it, guard pages included
    size_t map_bytes;
    char* open;  // the part between the guard pages
    size_t open_bytes;
    char* data;
    size_t bytes;
    View view;
    bool written;  // whether results go home
  };
  void* place(const View& view, bool filled, bool written);

  std::vector<Operand> operands_;
};

}  // namespace hostcuda
