#include "scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace kernel_check {
namespace {

constexpr size_t kSmallest = 64;  // bytes; less is not scratch, and pages cost time
constexpr int kBlocks = 16384;    // alive at once: those of a call that faults stay

struct Block {
  unsigned char* map = nullptr;  // open pages, then a closed one
  unsigned char* begin = nullptr;
  size_t open_bytes = 0, bytes = 0;
};
Block blocks[kBlocks];  // no container, since these would call what is defined here
int touched = 0;        // the blocks from here on have never been in use
bool guarding = false;

void* allocate(size_t bytes, size_t alignment) {
  int i = 0;
  while (i < touched && blocks[i].map) ++i;
  Block* block = &blocks[i];
  if (!guarding || bytes < kSmallest || i == kBlocks) {
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (void* plain = std::aligned_alloc(alignment, rounded)) return plain;
    std::abort();
  }
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  touched = i < touched ? touched : i + 1;
  block->bytes = (bytes + alignment - 1) / alignment * alignment;
  block->open_bytes = (block->bytes + page - 1) / page * page;
  void* map = mmap(nullptr, block->open_bytes + page, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) std::abort();
  block->map = static_cast<unsigned char*>(map);
  if (mprotect(block->map + block->open_bytes, page, PROT_NONE) != 0) std::abort();
  block->begin = block->map + block->open_bytes - block->bytes;
  return block->begin;
}

void release(void* p) {
  for (int i = 0; i < touched; ++i) {
    Block& one = blocks[i];
    if (!p || one.begin != p) continue;
    munmap(one.map, one.open_bytes + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
    one = Block{};
    return;
  }
  std::free(p);
}

}  // namespace

void guard_scratch(bool on) { guarding = on; }

std::string describe_scratch(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (int i = 0; i < touched; ++i) {
    const Block& one = blocks[i];
    const unsigned char* end = one.begin + one.bytes;
    if (one.map && at >= end && at < end + sysconf(_SC_PAGESIZE)) {
      return std::to_string(at - end + 1) + " bytes past the end of scratch of " +
             std::to_string(one.bytes) + " bytes";
    }
  }
  return "";
}

}  // namespace kernel_check

void* operator new(size_t bytes) {
  return kernel_check::allocate(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return kernel_check::allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept { kernel_check::release(p); }
void operator delete[](void* p) noexcept { kernel_check::release(p); }
void operator delete(void* p, size_t) noexcept { kernel_check::release(p); }
void operator delete[](void* p, size_t) noexcept { kernel_check::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { kernel_check::release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { kernel_check::release(p); }
