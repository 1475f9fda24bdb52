#include "report.h"

#include <cstdio>
#include <cstring>
#include <sstream>

#include "cpu/dispatch/features.h"

namespace kernel_check {
namespace {

constexpr size_t kComplaints = 3;  // printed of a line; the others are counted

bool print_line(const std::string& stem, const std::string& copy, const Tally& tally) {
  const bool ok = tally.failed == 0 && tally.calls > 0;
  std::printf("%-14s %-15s %-4s %4d calls", stem.c_str(), copy.c_str(), ok ? "ok" : "FAIL",
              tally.calls);
  if (copy == "base") {
    std::printf(", what the others are compared with");
  } else if (tally.worst < 0) {
    std::printf(", every bit the same");
  } else {
    std::printf(", largest error %.2f of what is allowed", tally.worst);
  }
  if (tally.failed > 0) std::printf("; %d wrong", tally.failed);
  std::printf("\n");
  for (size_t i = 0; i < tally.complaints.size() && i < kComplaints; ++i) {
    std::printf("    %s\n", tally.complaints[i].c_str());
  }
  std::fflush(stdout);
  return ok;
}

}  // namespace

std::vector<std::string> runnable_copies() {
  std::vector<std::string> names;
  for (auto isa = filbert::runnable_isas(); isa->name; ++isa) {
    if (std::strcmp(isa->name, "base") != 0) names.emplace_back(isa->name);
  }
  return names;
}

int run_all(const std::vector<std::string>& copies) {
  int wrong = 0;
  for (const auto& [stem, cases] : all_cases()) {
    Suite suite(copies);
    cases(suite);
    const auto& tallies = suite.tallies();
    std::vector<std::string> names = {"base"};
    names.insert(names.end(), copies.begin(), copies.end());
    for (const std::string& copy : names) {
      const auto found = tallies.find(copy);
      wrong += !print_line(stem, copy, found == tallies.end() ? Tally{} : found->second);
    }
  }
  std::stringstream stems(KERNEL_CHECK_STEMS);
  for (std::string stem; std::getline(stems, stem, ',');) {
    if (all_cases().count(stem)) continue;
    std::printf("%-14s has no cases: need tests/avx512/cases/%s.cpp\n", stem.c_str(), stem.c_str());
    ++wrong;
  }
  return wrong;
}

}  // namespace kernel_check
