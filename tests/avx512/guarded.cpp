#include "guarded.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace kernel_check {
namespace {

// A NaN as float32 and as bfloat16, by the parity of the address.
constexpr unsigned char kFresh[2] = {0xa5, 0x7f};
unsigned char fresh_at(const unsigned char* p) {
  return kFresh[reinterpret_cast<uintptr_t>(p) % 2];
}

std::vector<Guarded*>& alive() {
  static std::vector<Guarded*> instance;
  return instance;
}

size_t page_bytes() {
  static const auto instance = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return instance;
}

sigjmp_buf resume;
volatile sig_atomic_t expected = 0;
volatile sig_atomic_t signal_number = 0;
void* volatile signal_address = nullptr;

void on_signal(int number, siginfo_t* info, void*) {
  if (!expected) {  // of the check itself
    signal(number, SIG_DFL);
    return;  // the instruction runs again, and ends the process
  }
  signal_number = number;
  signal_address = info->si_addr;
  siglongjmp(resume, 1);
}

void listen() {
  static bool done = false;
  if (done) return;
  done = true;
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, nullptr);
}

}  // namespace

Guarded::Guarded(size_t bytes) : bytes_(bytes) {
  const size_t page = page_bytes();
  open_bytes_ = (bytes + page - 1) / page * page;
  void* map = mmap(nullptr, open_bytes_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    std::perror("kernel_check: no memory for a tensor");
    std::exit(2);
  }
  map_ = static_cast<unsigned char*>(map);
  begin_ = map_ + page + open_bytes_ - bytes;
  protect(false);
  for (unsigned char* p = map_ + page; p < map_ + page + open_bytes_; ++p) *p = fresh_at(p);
  alive().push_back(this);
}

Guarded::~Guarded() {
  auto& all = alive();
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
  munmap(map_, open_bytes_ + 2 * page_bytes());
}

void Guarded::protect(bool read_only) {
  if (open_bytes_ == 0) return;
  if (mprotect(map_ + page_bytes(), open_bytes_, PROT_READ | (read_only ? 0 : PROT_WRITE)) != 0) {
    std::perror("kernel_check: mprotect");
    std::exit(2);
  }
}

bool Guarded::margin_intact() const {
  for (const unsigned char* p = map_ + page_bytes(); p < begin_; ++p) {
    if (*p != fresh_at(p)) return false;
  }
  return true;
}

void protect_all(const std::function<bool(const Guarded*)>& written) {
  for (Guarded* one : alive()) one->protect(!written(one));
}

void release_all() {
  for (Guarded* one : alive()) one->protect(false);
}

std::string describe(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (const Guarded* one : alive()) {
    if (at < one->map_ || at >= one->map_ + one->open_bytes_ + 2 * page_bytes()) continue;
    const auto* end = one->begin_ + one->bytes_;
    const std::string tensor = "a tensor of " + std::to_string(one->bytes_) + " bytes";
    if (at >= end) return std::to_string(at - end + 1) + " bytes past the end of " + tensor;
    if (at < one->begin_) {
      return std::to_string(one->begin_ - at) + " bytes before the start of " + tensor;
    }
    return "in " + tensor + " that is only read";
  }
  if (std::string scratch = describe_scratch(address); !scratch.empty()) return scratch;
  return "in no tensor";
}

std::string fault_of(const std::function<void()>& body) {
  listen();
  if (sigsetjmp(resume, 1) == 0) {
    expected = 1;
    guard_scratch(true);
    body();
    guard_scratch(false);
    expected = 0;
    return "";
  }
  guard_scratch(false);
  expected = 0;
  if (signal_number == SIGILL) return "an instruction that this processor does not have";
  if (signal_number == SIGFPE) return "an integer division by zero";
  return "memory that it may not touch: " + describe(signal_address);
}

}  // namespace kernel_check
