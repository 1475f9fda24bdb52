// What the cases of a kernel are written with.
//
// A case makes tensors, names its results and says how the kernel is called; Suite::run calls it
// once for each copy. The first copy is `base`, and what the others must give is the rule of
// tests/tolerances.py with `base` in PyTorch's place: integers are the same, and a float's error
// against the float64 answer is at most twice base's, plus one rounding.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "args/common.h"
#include "guarded.h"

namespace kernel_check {

using filbert::DType;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};  // those of the CPU kernels

// Numbers of either type, read and written as double.
class Floats : public Guarded {
 public:
  Floats(DType dtype, int64_t count)
      : Guarded(count * filbert::size_of(dtype)), dtype_(dtype), count_(count) {}
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  void* data() const { return begin(); }
  double at(int64_t i) const;
  std::vector<double> values() const;
  void set(int64_t i, double value);  // rounded to the type
  Floats& fill(const std::function<double(int64_t)>& value) {
    for (int64_t i = 0; i < count_; ++i) set(i, value(i));
    return *this;
  }

 private:
  DType dtype_;
  int64_t count_;
};

// The same numbers on every run.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 2654435761u + 88172645463325252u) {}
  uint32_t word();
  int64_t integer(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(word() % static_cast<uint64_t>(most - least + 1));
  }
  double normal();

 private:
  uint64_t state_;
};

// One result of a call.
struct Result {
  const char* name;
  Guarded* memory;
  const Floats* floats;       // null: every bit must be base's
  std::vector<double> exact;  // [rows * width], the float64 answer
  int64_t width, stride;      // of a row in elements; between rows nothing may change
};

Result bits(const char* name, Guarded& memory);
Result near(const char* name, Floats& floats, std::vector<double> exact, int64_t width = 0,
            int64_t stride = 0);

// What became of one copy's calls.
struct Tally {
  int calls = 0, failed = 0;
  double worst = -1;  // error over what is allowed; negative where nothing is rounded
  std::vector<std::string> complaints;
};

class Suite {
 public:
  explicit Suite(std::vector<std::string> copies) : copies_(std::move(copies)) {}

  // Calls `call` for base and every copy. Results start each time with what they hold now.
  void run(const std::string& name, std::vector<Result> results, const std::function<void()>& call);

  const std::map<std::string, Tally>& tallies() const { return tallies_; }

 private:
  std::string attempt(const std::string& copy, std::vector<Result>& results,
                      const std::vector<std::vector<unsigned char>>& before,
                      const std::function<void()>& call);
  void complain(const std::string& copy, const std::string& name, const std::string& what);

  std::vector<std::string> copies_;
  std::map<std::string, Tally> tallies_;
};

// A stem's cases. Each file of cases/ has one object of this type, and nothing else lists them.
struct Cases {
  Cases(const char* stem, void (*run)(Suite&));
};
const std::map<std::string, void (*)(Suite&)>& all_cases();

}  // namespace kernel_check
