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

// The end of the data as close to the guard page as the alignment of its home allows.
void* Operands::place(const void* from, size_t bytes, bool filled, void* home) {
  if (recording()) return const_cast<void*>(from);
  if (operands_.empty()) alive().push_back(this);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  Operand o{};
  o.number = static_cast<int>(operands_.size());
  o.bytes = bytes;
  o.home = home;
  o.open_bytes = (bytes + 16 + page - 1) / page * page;
  o.map_bytes = o.open_bytes + 2 * page;
  void* map = mmap(nullptr, o.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  o.map = static_cast<char*>(map);
  o.open = o.map + page;
  mprotect(o.open, o.open_bytes, PROT_READ | PROT_WRITE);
  std::memset(o.open, kPoison, o.open_bytes);
  const size_t phase = reinterpret_cast<uintptr_t>(from) % 16;
  const size_t last = o.open_bytes - bytes;  // the latest place, page-aligned end
  o.data = o.open + last - (last % 16 + 16 - phase) % 16;
  if (filled && bytes > 0) std::memcpy(o.data, from, bytes);
  if (home == nullptr) mprotect(o.open, o.open_bytes, PROT_READ);
  operands_.push_back(o);
  return o.data;
}

const void* Operands::read(const void* home, size_t bytes) {
  return place(home, bytes, true, nullptr);
}
void* Operands::write(void* home, size_t bytes) { return place(home, bytes, false, home); }
void* Operands::update(void* home, size_t bytes) { return place(home, bytes, true, home); }

void Operands::finish() {
  for (const Operand& o : operands_) {
    const auto poison = [](char c) { return static_cast<unsigned char>(c) == kPoison; };
    if (!std::all_of(o.open, o.data, poison) ||
        !std::all_of(o.data + o.bytes, o.open + o.open_bytes, poison)) {
      throw std::runtime_error(
          "hostcuda: out of bounds: something was written just outside of operand " +
          std::to_string(o.number));
    }
  }
  for (const Operand& o : operands_) {
    if (o.home && o.bytes > 0) std::memcpy(o.home, o.data, o.bytes);
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
