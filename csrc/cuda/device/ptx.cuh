// Every machine instruction the kernels use by name, one function each. This is the whole seam
// between a kernel and the hardware: without nvcc, tests/hostcuda supplies the same functions and
// runs the same kernels on the host.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with lane = 4 g + t:
//   A  4 registers: (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8)
//   B  2 registers: (k 2t, column g), (k 2t + 8, column g)
//   C  4 floats:    (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// where a register holds two neighbouring values along k.
//
// Of the one-bit mma.m16n8k256, a register holding 32 neighbouring bits along k:
//   A  4 registers: (row g, word t), (row g + 8, word t), (row g, word t + 4), (g + 8, t + 4)
//   B  2 registers: (word t, column g), (word t + 4, column g)
//   C  as above, integers
// mma.m16n8k128 has the first half of A and B. mma.m16n8k32 is m16n8k256 with four neighbouring
// bytes along k for a word.
#pragma once

#ifndef __CUDACC__
#include "hostcuda/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/types.h"

namespace filbert {
namespace cuda {

// threadIdx.x, read at this place. What follows from threadIdx.x itself the compiler computes once
// and keeps, and where registers are scarce that costs more than to compute it again.
__device__ __forceinline__ unsigned thread_read_anew() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// --- shared memory: one dynamic block, addressed in bytes from its start ---

// Where the block's dynamic shared memory starts.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char filbert_shared_memory[];
  return filbert_shared_memory;
}

// The address by which instructions know a place in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void store_shared_4(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t from) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// --- global memory, 8 or 16 aligned bytes at a time ---

__device__ __forceinline__ uint2 load_8(const void* from) {
  return *static_cast<const uint2*>(from);
}
__device__ __forceinline__ void store_8(void* to, uint2 value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ uint4 load_16(const void* from) {
  return *static_cast<const uint4*>(from);
}
// Spelled out, because the compiler takes an assignment apart into four stores.
__device__ __forceinline__ void store_16(void* to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Asks for the line at `from` to be brought into the L2.
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Copies 16 bytes to shared memory in the background, or writes 16 zeros if not `valid`: then
// `from` is not read, and may be any address. Both sides are aligned to 16.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The same for 4 bytes, aligned to 4.
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Closes a group of copies. Groups complete in order.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `kPending` youngest groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores ---

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8 and
// receives, of each matrix, the two values at row i / 4, columns 2 (i % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(from)
               : "memory");
}

// The same with every matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(from)
               : "memory");
}

// c += a b, 16x8x16, sums in float32.
template <typename T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1);
template <>
__device__ __forceinline__ void mma_16816<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[i][j] += popcount(a[i] & b[j]), 16x8, over 256 bits. AND and not XOR, which Hopper emulates.
__device__ __forceinline__ void mma_b1_256(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same over 128 bits.
__device__ __forceinline__ void mma_b1_128(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, "
      "{%6}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// c += a b, 16x8x32, of unsigned bytes a and signed bytes b; a sum beyond int32 wraps.
__device__ __forceinline__ void mma_16832_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- numbers ---

// Two floats rounded to 16 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// 2^x, within 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 1 unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a - b, or the nearest integer there is.
__device__ __forceinline__ int32_t subtract_saturated(int32_t a, int32_t b) {
  int32_t d;
  asm("sub.sat.s32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The nearest integer, ties to even.
__device__ __forceinline__ float round_even(float x) { return rintf(x); }

// The same as an integer, for magnitudes below 2^22: an addition leaves it in the lower bits, where
// a conversion has a quarter of the throughput.
__device__ __forceinline__ int32_t small_int(float x) {
  constexpr float kOneAndAHalf = 12582912.0f;  // times 2^23
  return __float_as_int(__fadd_rn(x, kOneAndAHalf)) - 0x4b400000;
}

// The largest integer that is not above x, or the nearest there is; of a NaN the largest of all.
__device__ __forceinline__ int64_t floor_to_int64(double x) {
  return x != x ? INT64_MAX : static_cast<int64_t>(__double2ll_rd(x));
}

// a b rounded here and now: never part of a fused multiply-add.
__device__ __forceinline__ float multiply_rn(float a, float b) { return __fmul_rn(a, b); }

}  // namespace cuda
}  // namespace filbert

#endif
