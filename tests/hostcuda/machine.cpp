#include "hostcuda/machine.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>

#include "hostcuda/fiber.h"
#include "hostcuda/operands.h"

namespace hostcuda {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr size_t kSharedMost = size_t{227} << 10;  // of a block, on the GPUs that allow most
constexpr size_t kSharedAlignment = 128;
constexpr size_t kMargin = 4096;         // before a block's shared memory, watched for stray writes
constexpr unsigned char kPoison = 0xff;  // a NaN in every float format

struct Copy {
  uint32_t to;
  const void* from;
  size_t bytes;
  bool valid;
  int group;
};

enum class State { kReady, kAtBarrier, kMeeting, kDone };

struct Warp {
  const char* name = nullptr;  // of the collective under way
  const void* site = nullptr;  // and where in the code it is
  int arrived = 0;
  int parity = 0;
  char operands[2][kWarp * kOperandBytes];
  char results[2][kWarp * kOperandBytes];
};

struct Thread {
  Fiber fiber;
  Index3 index;
  int number = 0;
  State state = State::kReady;
  const char* where = "";
  std::vector<Copy> copies;
  int open_group = 0;
};

// A stack for each fiber, below each a page that faults on overflow.
class Stacks {
 public:
  explicit Stacks(size_t count) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    bytes_ = count * (kStackBytes + page_);
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < count; ++i)
      mprotect(base_ + i * (kStackBytes + page_), page_, PROT_NONE);
  }
  char* at(size_t i) const { return base_ + i * (kStackBytes + page_) + page_; }

 private:
  size_t page_, bytes_;
  char* base_;
};

struct Machine {
  // of the launch
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  Index3 block, blocks, threads;
  // of the block
  std::vector<std::unique_ptr<Thread>> pool;
  std::vector<Warp> warps;
  Thread* current = nullptr;
  int count = 0, done = 0, at_barrier = 0;
  std::string error;
  // shared memory, its end at a guard page
  char* arena = nullptr;  // kSharedMost and a margin, in whole pages
  size_t arena_bytes = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  // settings
  uint64_t seed = 0;
  int capability = 90;
  std::mt19937_64 random;
  bool recording = false;
  std::vector<std::function<void()>> recorded;
  // faults
  sigjmp_buf escape;
  volatile sig_atomic_t running = 0;
  void* volatile fault = nullptr;
  volatile int fault_signal = 0;
};

Machine& machine() {
  static Machine* instance = new Machine;  // outlives every static destructor
  return *instance;
}

std::string place() {
  Machine& m = machine();
  std::ostringstream text;
  text << "hostcuda: kernel " << m.kernel << ", block " << m.block.x;
  if (m.current) text << ", thread " << m.current->index.x;
  return text.str();
}

void thread_main(void* argument) {
  Machine& m = machine();
  auto* thread = static_cast<Thread*>(argument);
  for (;;) {
    (*m.body)();
    if (!thread->copies.empty()) fail("it ends with copies under way that it never waited for");
    thread->state = State::kDone;
    ++m.done;
    thread->fiber.yield();
  }
}

// Fibers that were left in the middle of a kernel cannot be used again, nor taken down.
void abandon_threads() {
  for (auto& thread : machine().pool) (void)thread.release();
  machine().pool.clear();
}

void need_threads(size_t count) {
  Machine& m = machine();
  if (m.pool.size() >= count) return;
  const size_t first = m.pool.size();
  const Stacks stacks(count - first);
  for (size_t i = first; i < count; ++i) {
    m.pool.push_back(std::make_unique<Thread>());
    m.pool[i]->fiber.start(thread_main, m.pool[i].get(), stacks.at(i - first), kStackBytes);
  }
}

void need_arena() {
  Machine& m = machine();
  if (m.arena) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  m.arena_bytes = (kSharedMost + kMargin + page - 1) / page * page;
  char* all = static_cast<char*>(
      mmap(nullptr, m.arena_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (all == MAP_FAILED) throw std::bad_alloc();
  m.arena = all + page;
  mprotect(m.arena, m.arena_bytes, PROT_READ | PROT_WRITE);
}

bool untouched(const char* from, const char* to) {
  return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kPoison; });
}

std::string who_waits() {
  Machine& m = machine();
  std::ostringstream text;
  for (int i = 0; i < m.count; ++i) {
    const Thread& t = *m.pool[i];
    if (t.state == State::kDone) continue;
    const int waiting =
        static_cast<int>(std::count_if(m.pool.begin(), m.pool.begin() + m.count,
                                       [](const auto& p) { return p->state != State::kDone; }));
    text << waiting << " of " << m.count << " threads wait, the first of them (thread " << i
         << ") at " << t.where << ", and " << m.done << " have returned";
    break;
  }
  return text.str();
}

// The lanes of one warp, each until it has to wait, again and again until all do.
bool run_warp(int first, std::vector<int>& order) {
  Machine& m = machine();
  const bool shuffled = m.seed != 0;
  bool progress = false;
  for (;;) {
    bool ran = false;
    if (shuffled) std::shuffle(order.begin(), order.end(), m.random);
    for (int lane : order) {
      if (first + lane >= m.count) continue;
      Thread& t = *m.pool[first + lane];
      if (t.state != State::kReady) continue;
      m.current = &t;
      t.fiber.resume();
      if (!m.error.empty()) return true;
      ran = progress = true;
    }
    if (!ran) return progress;
    if (shuffled && m.random() % 4 == 0) return progress;  // another warp overtakes
  }
}

void run_block() {
  Machine& m = machine();
  for (int i = 0; i < m.count; ++i) {
    Thread& t = *m.pool[i];
    t.index = {static_cast<unsigned>(i), 0, 0};
    t.number = i;
    t.state = State::kReady;
    t.copies.clear();
    t.open_group = 0;
  }
  for (Warp& w : m.warps) w.arrived = 0;
  m.done = m.at_barrier = 0;
  std::memset(m.shared - kMargin, kPoison, kMargin + (m.arena + m.arena_bytes - m.shared));

  std::vector<int> warp_order(m.warps.size()), lane_order(kWarp);
  for (size_t i = 0; i < warp_order.size(); ++i) warp_order[i] = static_cast<int>(i);
  for (int i = 0; i < kWarp; ++i) lane_order[i] = i;
  while (m.done < m.count) {
    if (m.seed != 0) std::shuffle(warp_order.begin(), warp_order.end(), m.random);
    bool progress = false;
    for (int warp : warp_order) {
      progress |= run_warp(warp * kWarp, lane_order);
      if (!m.error.empty()) return;
    }
    if (!progress) {
      m.current = nullptr;
      m.error = place() + ": divergence: " + who_waits();
      return;
    }
  }
  m.current = nullptr;
  if (!untouched(m.shared - kMargin, m.shared) ||
      !untouched(m.shared + m.shared_bytes, m.arena + m.arena_bytes)) {
    m.error = place() + ": it wrote outside of its shared memory";
  }
}

void on_fault(int signal, siginfo_t* info, void*) {
  Machine& m = machine();
  if (!m.running) {  // not ours: as if there were no handler
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, nullptr);
    return;
  }
  m.fault = info->si_addr;
  m.fault_signal = signal;
  siglongjmp(m.escape, 1);
}

// Catches faults for as long as it lives, on a stack of its own.
class FaultHandler {
 public:
  FaultHandler() {
    static char stack[64 << 10];
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
    machine().running = 1;
  }
  ~FaultHandler() {
    machine().running = 0;
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

void run_blocks(int64_t blocks) {
  Machine& m = machine();
  const FaultHandler handler;
  if (sigsetjmp(m.escape, 1) != 0) {
    m.error = place() + ": out of bounds: " + Operands::describe(m.fault);
    return;
  }
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  if (m.seed != 0) std::shuffle(order.begin(), order.end(), m.random);
  for (const unsigned block : order) {
    m.block.x = block;
    run_block();
    if (!m.error.empty()) return;
  }
}

}  // namespace

void run(const char* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes,
         const std::function<void()>& body) {
  Machine& m = machine();
  if (m.recording) {
    const std::string name = kernel;
    m.recorded.push_back([name, blocks, threads, shared_bytes, body] {
      run(name.c_str(), blocks, threads, shared_bytes, body);
    });
  }
  m.kernel = kernel;
  m.block = {};
  m.current = nullptr;
  m.error.clear();
  const auto shared = static_cast<size_t>(shared_bytes);
  if (threads < 1 || threads > 1024 || threads % kWarp != 0 || blocks < 0 ||
      shared > static_cast<size_t>(shared_most())) {
    throw std::runtime_error(place() + ": no GPU launches " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  }
  need_arena();
  need_threads(static_cast<size_t>(threads));
  m.body = &body;
  m.blocks = {static_cast<unsigned>(blocks), 1, 1};
  m.threads = {static_cast<unsigned>(threads), 1, 1};
  m.count = static_cast<int>(threads);
  m.warps.resize(static_cast<size_t>(threads) / kWarp);
  m.shared_bytes = shared;
  const size_t rounded = (shared + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  m.shared = m.arena + m.arena_bytes - rounded;
  m.random.seed(m.seed);
  run_blocks(blocks);
  if (!m.error.empty()) {
    abandon_threads();
    throw std::runtime_error(m.error);
  }
}

void set_seed(uint64_t seed) { machine().seed = seed; }
uint64_t seed() { return machine().seed; }

void set_capability(int capability) { machine().capability = capability; }
int capability() { return machine().capability; }
int64_t shared_most() {
  switch (capability()) {
    case 75:
      return 64 << 10;
    case 80:
      return 163 << 10;
    case 90:
    case 100:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

void record(bool on) {
  machine().recording = on;
  if (on) machine().recorded.clear();
}
bool recording() { return machine().recording; }
void replay() {
  if (machine().recording) throw std::runtime_error("hostcuda: replay() while recording");
  for (const auto& launch : machine().recorded) launch();
}

const Index3& thread_index() { return machine().current->index; }
const Index3& block_index() { return machine().block; }
const Index3& block_size() { return machine().threads; }
const Index3& grid_size() { return machine().blocks; }
int lane() { return machine().current->number % kWarp; }

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = place() + ": " + what;
  for (;;) m.current->fiber.yield();  // nobody comes back
}

void barrier(const char* name) {
  Machine& m = machine();
  Thread& t = *m.current;
  t.where = name;
  t.state = State::kAtBarrier;
  if (++m.at_barrier < m.count) {
    t.fiber.yield();
    return;
  }
  m.at_barrier = 0;
  for (int i = 0; i < m.count; ++i) m.pool[i]->state = State::kReady;
}

char* shared_base() { return machine().shared; }

char* shared_at(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  Machine& m = machine();
  if (address + bytes > m.shared_bytes) {
    fail(std::string("out of bounds: ") + what + " at byte " + std::to_string(address) + " of " +
         std::to_string(m.shared_bytes) + " of shared memory");
  }
  if (address % alignment != 0) {
    fail(std::string("alignment: ") + what + " at byte " + std::to_string(address) +
         " of shared memory, no multiple of " + std::to_string(alignment));
  }
  return m.shared + address;
}

uint32_t shared_offset(const void* p) {
  Machine& m = machine();
  const auto* at = static_cast<const char*>(p);
  if (at < m.shared || at > m.shared + m.shared_bytes) {
    fail("shared_address() of something that is not in shared memory");
  }
  return static_cast<uint32_t>(at - m.shared);
}

void check_global(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(std::string("alignment: ") + what + " at an address that is no multiple of " +
         std::to_string(bytes));
  }
  if (!Operands::holds(p, bytes)) {
    fail(std::string("out of bounds: ") + what + ": " + Operands::describe(p));
  }
}

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid) {
  char* at = shared_at(to, bytes, bytes, "cp.async");
  if (valid) check_global(from, bytes, "cp.async");
  std::memset(at, kPoison, bytes);
  Thread& t = *machine().current;
  t.copies.push_back({to, from, bytes, valid, t.open_group});
}

void copy_async_commit() {
  Machine& m = machine();
  ++m.current->open_group;
  // Others see for a while what is still on its way, or was overwritten too early.
  if (m.seed != 0) m.current->fiber.yield();
}

void copy_async_wait(int pending) {
  Machine& m = machine();
  Thread& t = *m.current;
  const auto landed = [&](const Copy& c) { return c.group + pending < t.open_group; };
  for (const Copy& c : t.copies) {
    if (!landed(c)) continue;
    if (c.valid) {
      std::memcpy(m.shared + c.to, c.from, c.bytes);
    } else {
      std::memset(m.shared + c.to, 0, c.bytes);
    }
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), landed), t.copies.end());
}

Meeting meet(const char* name, const void* operand, size_t bytes) {
  Machine& m = machine();
  Thread& t = *m.current;
  Warp& w = m.warps[static_cast<size_t>(t.number / kWarp)];
  const void* site = __builtin_return_address(0);
  if (w.arrived > 0 && (std::strcmp(w.name, name) != 0 || w.site != site)) {
    fail(std::string("divergence: at ") + name + " while other lanes of its warp are at " +
         (std::strcmp(w.name, name) != 0 ? w.name : "another one"));
  }
  w.name = name;
  w.site = site;
  const int parity = w.parity;
  std::memcpy(w.operands[parity] + t.number % kWarp * kOperandBytes, operand, bytes);
  t.where = name;
  const Meeting meeting{++w.arrived == kWarp, w.operands[parity], w.results[parity]};
  if (!meeting.last) {
    t.state = State::kMeeting;
    t.fiber.yield();
  }
  return meeting;
}

void release() {
  Machine& m = machine();
  const int first = m.current->number / kWarp * kWarp;
  Warp& w = m.warps[static_cast<size_t>(first / kWarp)];
  w.arrived = 0;
  w.parity ^= 1;  // the next operands may come before these results are read
  for (int i = first; i < first + kWarp; ++i) m.pool[i]->state = State::kReady;
}

}  // namespace hostcuda
