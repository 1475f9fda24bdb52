// Pretended device memory. Each operand of a call is copied between pages that nobody may touch, so
// that a kernel that leaves its operand faults; what is only read may not be written; what is to be
// filled starts as NaN.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace hostcuda {

class Operands {
 public:
  Operands() = default;
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;
  ~Operands();

  const void* read(const void* home, size_t bytes);
  void* write(void* home, size_t bytes);
  void* update(void* home, size_t bytes);

  // Checks the margins around every operand, and copies back what was written.
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
    void* home;  // where the result goes; null for what is only read
  };
  void* place(const void* from, size_t bytes, bool filled, void* home);

  std::vector<Operand> operands_;
};

}  // namespace hostcuda
