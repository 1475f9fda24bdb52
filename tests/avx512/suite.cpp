#include "suite.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch/features.h"

namespace kernel_check {
namespace {

constexpr double kFactor = 2.0;            // of base's error
constexpr double kBaseError = 1.0 / 64.0;  // of the largest value: more, and the reference is wrong
constexpr double kSmallest = 0x1p-126;     // what is smaller may be 0

double epsilon(DType dtype) { return dtype == DType::kFloat32 ? 0x1p-23 : 0x1p-7; }

// The largest error, as tests/tolerances.py takes it.
struct Errors {
  double worst = 0;
  int64_t at = 0;
  bool nan_differs = false;
};

int64_t place(const Result& result, int64_t i) {
  return i / result.width * result.stride + i % result.width;
}

Errors errors(const Result& result) {
  Errors found;
  for (int64_t i = 0; i < static_cast<int64_t>(result.exact.size()); ++i) {
    const double exact = result.exact[i], got = result.floats->at(place(result, i));
    if (std::isnan(exact) != std::isnan(got)) {
      found.nan_differs = true;
      found.at = i;
      return found;
    }
    if (std::isnan(exact)) continue;
    const double error =
        std::isinf(exact) ? (got == exact ? 0.0 : HUGE_VAL) : std::fabs(got - exact);
    if (error > found.worst) {
      found.worst = error;
      found.at = i;
    }
  }
  return found;
}

double largest(const std::vector<double>& exact) {
  double scale = 0;
  for (double value : exact) {
    if (std::isfinite(value)) scale = std::fmax(scale, std::fabs(value));
  }
  return scale;
}

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

std::string blame(const Result& result, const Errors& found, double allowed) {
  const int64_t i = found.at;
  std::string text = std::string(result.name) + "[" + std::to_string(i) + "]: got " +
                     number(result.floats->at(place(result, i))) + ", exact " +
                     number(result.exact[i]);
  if (!found.nan_differs) {
    text += ": error " + number(found.worst) + ", allowed " + number(allowed);
  }
  return text;
}

// The first byte that differs from `expected` where `watched` says that none may; or -1.
int64_t first_change(const Result& result, const std::vector<unsigned char>& expected,
                     const std::function<bool(int64_t)>& watched) {
  const unsigned char* now = result.memory->begin();
  if (std::memcmp(now, expected.data(), expected.size()) == 0) return -1;
  for (int64_t i = 0; i < static_cast<int64_t>(expected.size()); ++i) {
    if (now[i] != expected[i] && watched(i)) return i;
  }
  return -1;
}

std::vector<std::vector<unsigned char>> contents(const std::vector<Result>& results) {
  std::vector<std::vector<unsigned char>> all;
  for (const Result& result : results) {
    all.emplace_back(result.memory->begin(), result.memory->begin() + result.memory->bytes());
  }
  return all;
}

}  // namespace

double Floats::at(int64_t i) const {
  if (dtype_ == DType::kFloat32) return static_cast<const float*>(data())[i];
  const uint32_t wide = static_cast<uint32_t>(static_cast<const uint16_t*>(data())[i]) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

std::vector<double> Floats::values() const {
  std::vector<double> all(count_);
  for (int64_t i = 0; i < count_; ++i) all[i] = at(i);
  return all;
}

void Floats::set(int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  if (dtype_ == DType::kFloat32) {
    static_cast<float*>(data())[i] = narrow;
    return;
  }
  uint32_t wide;
  std::memcpy(&wide, &narrow, sizeof wide);
  const bool nan = narrow != narrow;
  wide = nan ? wide | 0x400000 : wide + 0x7fff + ((wide >> 16) & 1);
  static_cast<uint16_t*>(data())[i] = static_cast<uint16_t>(wide >> 16);
}

uint32_t Random::word() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return static_cast<uint32_t>(state_ >> 24);
}

double Random::normal() {  // near enough: the sum of twelve of them
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += word() * 0x1p-32;
  return sum;
}

Result bits(const char* name, Guarded& memory) { return {name, &memory, nullptr, {}, 1, 1}; }

Result near(const char* name, Floats& floats, std::vector<double> exact, int64_t width,
            int64_t stride) {
  if (width == 0) width = stride = static_cast<int64_t>(exact.size());
  return {name, &floats, &floats, std::move(exact), width, stride};
}

void Suite::complain(const std::string& copy, const std::string& name, const std::string& what) {
  Tally& tally = tallies_[copy];
  ++tally.failed;
  tally.complaints.push_back(name + ": " + what);
}

// One call, from fresh results on. Says what it did that no copy may do.
std::string Suite::attempt(const std::string& copy, std::vector<Result>& results,
                           const std::vector<std::vector<unsigned char>>& before,
                           const std::function<void()>& call) {
  for (size_t i = 0; i < results.size(); ++i) {
    std::memcpy(results[i].memory->begin(), before[i].data(), before[i].size());
  }
  if (!filbert::select_isa(copy.c_str())) return "does not run on this processor";
  if (std::string fault = fault_of(call); !fault.empty()) return fault;
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& result = results[i];
    if (!result.memory->margin_intact()) return std::string(result.name) + ": wrote before it";
    if (!result.floats) continue;
    const int64_t element = filbert::size_of(result.floats->dtype());
    const int64_t changed = first_change(result, before[i], [&](int64_t byte) {
      return byte / element % result.stride >= result.width;
    });
    if (changed >= 0) return std::string(result.name) + ": wrote between its rows";
  }
  return "";
}

void Suite::run(const std::string& name, std::vector<Result> results,
                const std::function<void()>& call) {
  const auto before = contents(results);
  protect_all([&](const Guarded* one) {
    for (const Result& result : results) {
      if (result.memory == one) return true;
    }
    return false;
  });
  ++tallies_["base"].calls;
  if (std::string wrong = attempt("base", results, before, call); !wrong.empty()) {
    complain("base", name, wrong);
    release_all();
    return;
  }
  const auto expected = contents(results);
  std::vector<double> allowed;
  for (const Result& result : results) {
    if (!result.floats) {
      allowed.push_back(0);
      continue;
    }
    const Errors found = errors(result);
    const double scale = largest(result.exact);
    const double most = kBaseError * scale + kSmallest;
    if (found.nan_differs || found.worst > most) complain("base", name, blame(result, found, most));
    allowed.push_back(kFactor * (std::isinf(found.worst) ? 0.0 : found.worst) +
                      epsilon(result.floats->dtype()) * scale);
  }
  for (const std::string& copy : copies_) {
    Tally& tally = tallies_[copy];
    ++tally.calls;
    std::string wrong = attempt(copy, results, before, call);
    for (size_t i = 0; i < results.size() && wrong.empty(); ++i) {
      const Result& result = results[i];
      if (!result.floats) {
        const int64_t at = first_change(result, expected[i], [](int64_t) { return true; });
        if (at >= 0) {
          wrong = std::string(result.name) + ": byte " + std::to_string(at) + " is " +
                  std::to_string(result.memory->begin()[at]) + ", not " +
                  std::to_string(expected[i][at]);
        }
        continue;
      }
      const Errors found = errors(result);
      if (found.nan_differs || found.worst > allowed[i]) wrong = blame(result, found, allowed[i]);
      if (found.worst > 0 && !std::isinf(found.worst)) {
        tally.worst = std::fmax(tally.worst, found.worst / allowed[i]);
      } else if (tally.worst < 0) {
        tally.worst = 0;
      }
    }
    if (!wrong.empty()) complain(copy, name, wrong);
  }
  release_all();
}

static std::map<std::string, void (*)(Suite&)>& registered() {
  static std::map<std::string, void (*)(Suite&)> instance;
  return instance;
}

Cases::Cases(const char* stem, void (*run)(Suite&)) { registered()[stem] = run; }

const std::map<std::string, void (*)(Suite&)>& all_cases() { return registered(); }

}  // namespace kernel_check
