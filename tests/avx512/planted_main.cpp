// kernel_check_planted: the same cases over a copy that is wrong in a known way. A fault that no
// kernel's cases see, or a kernel whose cases see no fault, fails.
#include <cstdio>
#include <set>

#include "planted.h"
#include "suite.h"

int kernel_check::planted = kernel_check::kNone;

namespace {

constexpr const char* kNames[kernel_check::kFaults] = {
    "no fault",
    "a population count loses a bit",
    "a word of comparisons loses a lane",
    "a tail's last number is not written",
    "a tail is read as a whole vector",
    "a sum is 1e-5 too large",
    "an exponential is 1e-5 too large",
};

}  // namespace

int main() {
  std::set<std::string> unseeing;
  for (const auto& [stem, cases] : kernel_check::all_cases()) unseeing.insert(stem);
  int wrong = 0;
  for (int fault = 0; fault < kernel_check::kFaults; ++fault) {
    kernel_check::planted = fault;
    std::string seen_by;
    for (const auto& [stem, cases] : kernel_check::all_cases()) {
      kernel_check::Suite suite({"emulated"});
      cases(suite);
      if (suite.tallies().at("emulated").failed == 0) continue;
      seen_by += " " + stem;
      unseeing.erase(stem);
    }
    const bool ok = seen_by.empty() == (fault == kernel_check::kNone);
    std::printf("planted: %-37s %-4s seen by%s\n", kNames[fault], ok ? "ok" : "FAIL",
                seen_by.empty() ? " none" : seen_by.c_str());
    wrong += !ok;
  }
  for (const std::string& stem : unseeing) {
    std::printf("planted: FAIL: the cases of %s see none of these\n", stem.c_str());
    ++wrong;
  }
  return wrong > 0 ? 1 : 0;
}
