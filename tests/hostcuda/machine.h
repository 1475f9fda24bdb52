// The pretended GPU: runs a kernel block by block, each thread of a block as a fiber.
//
// Stricter than a real one, since finding mistakes is its use. Which warp runs next, for how long,
// and which lane comes first are drawn from a seed; shared memory starts as NaN; a copy in the
// background leaves NaN at its destination until it is waited for; addresses are checked; and a
// barrier that some threads never reach is an error that names the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace hostcuda {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kWarp = 32;
constexpr size_t kOperandBytes = 64;  // of one lane in one collective

// Runs body() in every thread of every block.
//
// Raises: std::runtime_error, naming the kernel, block and thread, for any of the mistakes above.
void run(const char* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes,
         const std::function<void()>& body);

// 0: blocks, warps and lanes in their order. Else a random order, the same for the same seed.
void set_seed(uint64_t seed);
uint64_t seed();

// The compute capability that launches see, as 10 * major + minor. 90 at first.
void set_capability(int capability);
int capability();
// Bytes of shared memory that a block may have there.
int64_t shared_most();

// While recording, operands are not copied and every launch is kept; replay() repeats them on what
// memory holds then. The host's view of a CUDA graph.
void record(bool on);
bool recording();
void replay();

// --- what runs inside a thread of the kernel ---

const Index3& thread_index();
const Index3& block_index();
const Index3& block_size();
const Index3& grid_size();

[[noreturn]] void fail(const std::string& what);

void barrier(const char* name);  // of the block

char* shared_base();
// The place of `bytes` bytes at offset `address` in the block's shared memory.
char* shared_at(uint32_t address, size_t bytes, size_t alignment, const char* what);
uint32_t shared_offset(const void* p);

// A pointer into global memory that must be aligned and lie within an operand.
void check_global(const void* p, size_t bytes, const char* what);

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

// Joins the warp's other lanes at a collective operation. True for the last to arrive, which has to
// fill results() from operands() and call release(); the others return when it has.
struct Meeting {
  bool last;
  char* operands;  // [32][kOperandBytes]
  char* results;   // [32][kOperandBytes]
};
Meeting meet(const char* name, const void* operand, size_t bytes);
void release();
int lane();

// One collective: compute(operands of all lanes, results of all lanes) runs once for the warp.
template <typename Out, typename In, typename Compute>
inline __attribute__((always_inline)) Out collective(const char* name, const In& in,
                                                     Compute compute) {
  static_assert(sizeof(In) <= kOperandBytes && sizeof(Out) <= kOperandBytes, "too large");
  static_assert(std::is_trivially_copyable<In>::value, "operands are copied as bytes");
  const Meeting meeting = meet(name, &in, sizeof(In));
  if (meeting.last) {
    In operands[kWarp];
    Out results[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      std::memcpy(&operands[i], meeting.operands + i * kOperandBytes, sizeof(In));
    }
    compute(operands, results);
    for (int i = 0; i < kWarp; ++i) {
      std::memcpy(meeting.results + i * kOperandBytes, &results[i], sizeof(Out));
    }
    release();
  }
  Out out;
  std::memcpy(&out, meeting.results + lane() * kOperandBytes, sizeof(Out));
  return out;
}

}  // namespace hostcuda
