// Working memory of the thread that asks.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace filbert {

// A buffer each thread keeps between calls, so that no call pays page faults for it.
class Scratch {
 public:
  // That many bytes, 64-byte aligned. They are the last of the buffer, so that in the tests, where
  // a page without access follows it, a kernel cannot write past them.
  void* at_least(int64_t bytes) {
    const int64_t whole = (bytes + kAlign - 1) / kAlign * kAlign;
    if (whole > size_) {
      data_.reset();  // before the new one, so that both never live at once
      size_ = 0;      // and true if the next line throws
      data_.reset(static_cast<char*>(::operator new(whole, std::align_val_t{kAlign})));
      size_ = whole;
    }
    return data_.get() + (size_ - whole);
  }

  // Large calls must not pin their memory to the thread for good.
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kAlign = 64;
  static constexpr int64_t kKept = int64_t{4} << 20;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace filbert
