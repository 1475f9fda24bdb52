// Answers that never change and cost a call of the driver: kept once for each device.
#pragma once

#include <atomic>
#include <cstdint>

namespace filbert {
namespace cuda {

// Zeros in static storage, so it needs no construction; any thread may ask.
class OncePerDevice {
 public:
  // What `ask()` says of this device, which is 0 or more; asked again only beyond kDevices.
  template <typename Ask>
  int get(int device, const Ask& ask) {
    if (device < 0 || device >= kDevices) return ask();
    // One more than the answer: 0 is an answer too (the minor version of 8.0 and 9.0).
    int64_t known = known_[device].load(std::memory_order_relaxed);
    if (known == 0) {
      known = int64_t{ask()} + 1;
      known_[device].store(known, std::memory_order_relaxed);
    }
    return static_cast<int>(known - 1);
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices] = {};
};

}  // namespace cuda
}  // namespace filbert
