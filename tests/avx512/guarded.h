// Memory whose end is the end of what may be touched: an unmapped page lies behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace kernel_check {

class Guarded {
 public:
  explicit Guarded(size_t bytes);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  unsigned char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  void protect(bool read_only);
  // Whether nobody has written between the start of the first page and the first byte.
  bool margin_intact() const;

 private:
  friend std::string describe(const void* address);

  unsigned char* map_;  // a closed page, open pages, a closed page
  size_t open_bytes_;
  unsigned char* begin_;  // so that begin_ + bytes_ is where the second closed page starts
  size_t bytes_;
};

// Elements in such memory. They start as bytes that are NaN in every float format.
template <typename T>
class Array : public Guarded {
 public:
  explicit Array(int64_t count) : Guarded(count * sizeof(T)), count_(count) {}
  T* data() const { return reinterpret_cast<T*>(begin()); }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) const { return data()[i]; }
  Array& fill(const std::function<T(int64_t)>& value) {
    for (int64_t i = 0; i < count_; ++i) data()[i] = value(i);
    return *this;
  }

 private:
  int64_t count_;
};

// Makes everything that is alive readable only, but for what `written` says yes to.
void protect_all(const std::function<bool(const Guarded*)>& written);
void release_all();

// What goes wrong in `body`, in words: an address it may not touch, an instruction the processor
// does not have. Empty if nothing did. After a fault the memory that `body` held is lost.
std::string fault_of(const std::function<void()>& body);

}  // namespace kernel_check
