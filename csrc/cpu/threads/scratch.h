// Working memory of the thread that asks.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace filbert {

// A buffer each thread keeps between calls, so that no call pays page faults for it.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();  // before the new one, so that both never live at once
      size_ = 0;      // and true if the next line throws
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return data_.get();
  }

  // Large calls must not pin their memory to the thread for good.
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = int64_t{4} << 20;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

}  // namespace filbert
