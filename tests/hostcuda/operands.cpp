#include "hostcuda/operands.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>

#include "hostcuda/machine.h"

namespace hostcuda {
namespace {

constexpr unsigned char kPoison = 0xff;  // a NaN in every float format

// What lies around elements: a NaN in every float format too, and one that arithmetic changes, so
// that a result computed from it does not look like it. Two bytes, by the parity of the address.
constexpr unsigned char kMargin[2] = {0xa5, 0x7f};
unsigned char margin_at(const char* p) { return kMargin[reinterpret_cast<uintptr_t>(p) % 2]; }

void fill_margin(char* from, char* to) {
  for (char* p = from; p < to; ++p) *p = static_cast<char>(margin_at(p));
}
bool is_margin(const char* from, const char* to) {
  for (const char* p = from; p < to; ++p) {
    if (static_cast<unsigned char>(*p) != margin_at(p)) return false;
  }
  return true;
}

std::vector<const Operands*>& alive() {
  static auto* instance = new std::vector<const Operands*>;
  return *instance;
}

}  // namespace

Operands::~Operands() {
  auto& all = alive();
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
  for (const Operand& o : operands_) munmap(o.map, o.map_bytes);
}

size_t View::extent() const {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return static_cast<size_t>(last + 1) * element;
}

void View::for_runs(const std::function<void(size_t, size_t)>& body) const {
  if (extent() == 0) return;
  // The innermost dimension is one run where it is dense, else each element is.
  const size_t dims = sizes.size();
  const bool dense = dims > 0 && strides[dims - 1] == 1;
  const size_t outer = dense ? dims - 1 : dims;
  const size_t run = (dense ? static_cast<size_t>(sizes[dims - 1]) : 1) * element;
  std::vector<int64_t> index(outer, 0);
  for (;;) {
    int64_t at = 0;
    for (size_t d = 0; d < outer; ++d) at += index[d] * strides[d];
    body(static_cast<size_t>(at) * element, run);
    size_t d = outer;
    while (d > 0 && ++index[d - 1] == sizes[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

// Next to a guard page, as close as the alignment of its home allows: the one behind it, or for odd
// seeds the one before it.
void* Operands::place(const View& view, bool filled, bool written) {
  if (recording()) return view.home;
  if (operands_.empty()) alive().push_back(this);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = view.extent();
  Operand o{};
  o.number = static_cast<int>(operands_.size());
  o.bytes = bytes;
  o.view = view;
  o.written = written;
  o.open_bytes = (bytes + 16 + page - 1) / page * page;
  o.map_bytes = o.open_bytes + 2 * page;
  void* map = mmap(nullptr, o.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  o.map = static_cast<char*>(map);
  o.open = o.map + page;
  mprotect(o.open, o.open_bytes, PROT_READ | PROT_WRITE);
  const size_t phase = reinterpret_cast<uintptr_t>(view.home) % 16;
  const size_t last = o.open_bytes - bytes;
  o.data = o.open + (seed() % 2 == 1 ? phase : last - (last % 16 + 16 - phase) % 16);
  fill_margin(o.open, o.open + o.open_bytes);
  view.for_runs([&](size_t at, size_t run) {
    if (filled) {
      std::memcpy(o.data + at, static_cast<const char*>(view.home) + at, run);
    } else {
      std::memset(o.data + at, kPoison, run);
    }
  });
  if (!written) mprotect(o.open, o.open_bytes, PROT_READ);
  operands_.push_back(o);
  return o.data;
}

const void* Operands::read(const View& view) { return place(view, true, false); }
void* Operands::write(const View& view) { return place(view, false, true); }
void* Operands::update(const View& view) { return place(view, true, true); }

void Operands::finish() {
  for (const Operand& o : operands_) {
    if (!o.written) continue;
    const char* checked = o.open;  // up to here all is elements or untouched
    bool intact = true;
    o.view.for_runs([&](size_t at, size_t run) {
      const char* begin = o.data + at;
      if (begin > checked) intact = intact && is_margin(checked, begin);
      if (begin + run > checked) checked = begin + run;
    });
    if (!intact || !is_margin(checked, o.open + o.open_bytes)) {
      throw std::runtime_error(
          "hostcuda: out of bounds: something was written just outside of operand " +
          std::to_string(o.number) + ", or between its rows");
    }
  }
  for (const Operand& o : operands_) {
    if (!o.written) continue;
    o.view.for_runs([&](size_t at, size_t run) {
      std::memcpy(static_cast<char*>(o.view.home) + at, o.data + at, run);
    });
  }
}

std::string Operands::describe(const void* address) {
  const auto* at = static_cast<const char*>(address);
  std::ostringstream text;
  for (const Operands* call : alive()) {
    for (const Operand& o : call->operands_) {
      if (at < o.map || at >= o.map + o.map_bytes) continue;
      text << "operand " << o.number << " of the call has " << o.bytes << " bytes; touched ";
      if (at < o.data) {
        text << o.data - at << " bytes before its start";
      } else if (at >= o.data + o.bytes) {
        text << at - (o.data + o.bytes) << " bytes after its end";
      } else {
        text << "for writing, and it is only to be read";
      }
      return text.str();
    }
  }
  text << "an address that belongs to no operand of the call";
  return text.str();
}

bool Operands::holds(const void* address, size_t bytes) {
  const auto* at = static_cast<const char*>(address);
  bool any = false;
  for (const Operands* call : alive()) {
    for (const Operand& o : call->operands_) {
      any = true;
      if (at >= o.data && at + bytes <= o.data + o.bytes) return true;
    }
  }
  return !any;
}

}  // namespace hostcuda
