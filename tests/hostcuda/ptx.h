// csrc/cuda/device/ptx.cuh for the host: the same functions by their meaning in the PTX ISA, and
// the few words of CUDA C++ that the kernels use. Collectives are always inlined: where in the code
// a lane stands is how two of one kind are told apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device/types.h"
#include "hostcuda/machine.h"
#include "hostcuda/numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::hostcuda::thread_index())
#define blockIdx (::hostcuda::block_index())
#define blockDim (::hostcuda::block_size())
#define gridDim (::hostcuda::grid_size())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

__forceinline__ void __syncthreads() { hostcuda::barrier("__syncthreads"); }

__forceinline__ void __syncwarp() {
  hostcuda::collective<char>("__syncwarp", char{}, [](const auto&, auto& out) {
    for (char& c : out) c = 0;
  });
}

template <typename T>
__forceinline__ T __shfl_sync(unsigned, T x, int source) {
  struct In {
    T x;
    int source;
  };
  return hostcuda::collective<T>("__shfl_sync", In{x, source}, [](const auto& in, auto& out) {
    for (int i = 0; i < hostcuda::kWarp; ++i) out[i] = in[in[i].source % hostcuda::kWarp].x;
  });
}

template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, hostcuda::lane() ^ lanes);
}

__forceinline__ unsigned __ballot_sync(unsigned, int predicate) {
  return hostcuda::collective<unsigned>("__ballot_sync", predicate != 0,
                                        [](const auto& in, auto& out) {
                                          unsigned bits = 0;
                                          for (int i = 0; i < hostcuda::kWarp; ++i)
                                            bits |= static_cast<unsigned>(in[i]) << i;
                                          for (int i = 0; i < hostcuda::kWarp; ++i) out[i] = bits;
                                        });
}

inline int atomicAdd(int* p, int value) {
  const int before = *p;
  *p = before + value;
  return before;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return out;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace filbert {
namespace cuda {

inline unsigned thread_read_anew() { return hostcuda::thread_index().x; }

inline char* shared_memory() { return hostcuda::shared_base(); }
inline uint32_t shared_address(const void* p) { return hostcuda::shared_offset(p); }

inline void store_shared_4(uint32_t to, uint32_t value) {
  std::memcpy(hostcuda::shared_at(to, 4, 4, "st.shared.b32"), &value, 4);
}
inline void store_shared_16(uint32_t to, uint4 value) {
  std::memcpy(hostcuda::shared_at(to, 16, 16, "st.shared.v4"), &value, 16);
}
inline uint32_t load_shared_4(uint32_t from) {
  uint32_t v;
  std::memcpy(&v, hostcuda::shared_at(from, 4, 4, "ld.shared.b32"), 4);
  return v;
}
inline uint2 load_shared_8(uint32_t from) {
  uint2 v;
  std::memcpy(&v, hostcuda::shared_at(from, 8, 8, "ld.shared.v2"), 8);
  return v;
}
inline uint4 load_shared_16(uint32_t from) {
  uint4 v;
  std::memcpy(&v, hostcuda::shared_at(from, 16, 16, "ld.shared.v4"), 16);
  return v;
}

inline uint2 load_8(const void* from) {
  hostcuda::check_global(from, 8, "a load of 8 bytes");
  uint2 v;
  std::memcpy(&v, from, 8);
  return v;
}
inline void store_8(void* to, uint2 value) {
  hostcuda::check_global(to, 8, "a store of 8 bytes");
  std::memcpy(to, &value, 8);
}
inline uint4 load_16(const void* from) {
  hostcuda::check_global(from, 16, "a load of 16 bytes");
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}
inline void store_16(void* to, uint4 value) {
  hostcuda::check_global(to, 16, "a store of 16 bytes");
  std::memcpy(to, &value, 16);
}

inline void prefetch_l2(const void*) {}

inline void cp_async_16(uint32_t to, const void* from, bool valid) {
  hostcuda::copy_async(to, from, 16, valid);
}
inline void cp_async_4(uint32_t to, const void* from, bool valid) {
  hostcuda::copy_async(to, from, 4, valid);
}
inline void cp_async_commit() { hostcuda::copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  hostcuda::copy_async_wait(kPending);
}

struct Registers4 {
  uint32_t d[4];
};

__forceinline__ void ldmatrix(const char* name, uint32_t (&d)[4], uint32_t from, bool transposed) {
  const Registers4 all =
      hostcuda::collective<Registers4>(name, from, [&](const auto& in, auto& out) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t values[8][8];
          for (int row = 0; row < 8; ++row) {
            std::memcpy(values[row], hostcuda::shared_at(in[matrix * 8 + row], 16, 16, name), 16);
          }
          for (int lane = 0; lane < hostcuda::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = transposed ? values[t][g] : values[g][t];
            const uint32_t high = transposed ? values[t + 1][g] : values[g][t + 1];
            out[lane].d[matrix] = low | high << 16;
          }
        }
      });
  std::memcpy(d, all.d, sizeof d);
}

__forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t from) {
  ldmatrix("ldmatrix", d, from, false);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t from) {
  ldmatrix("ldmatrix.trans", d, from, true);
}

template <typename T>
__forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    float c[4];
    uint32_t a[4], b[2];
  } in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  struct Out {
    float c[4];
  };
  const Out out =
      hostcuda::collective<Out>("mma.m16n8k16", in, [](const auto& lanes, auto& results) {
        float a[16][16], b[8][16];  // b by column
        for (int lane = 0; lane < hostcuda::kWarp; ++lane) {
          const int g = lane / 4, t = lane % 4 * 2;
          for (int i = 0; i < 2; ++i) {
            const auto half = [i](uint32_t pair) {
              return hostcuda::widen<T>(static_cast<uint16_t>(pair >> 16 * i));
            };
            a[g][t + i] = half(lanes[lane].a[0]);
            a[g + 8][t + i] = half(lanes[lane].a[1]);
            a[g][t + 8 + i] = half(lanes[lane].a[2]);
            a[g + 8][t + 8 + i] = half(lanes[lane].a[3]);
            b[g][t + i] = half(lanes[lane].b[0]);
            b[g][t + 8 + i] = half(lanes[lane].b[1]);
          }
        }
        for (int lane = 0; lane < hostcuda::kWarp; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
            results[lane].c[i] = lanes[lane].c[i] + sum;
          }
        }
      });
  std::memcpy(c, out.c, sizeof c);
}

// Integer products over kWords words of k: 8, or 4 where the second half of A and B is left out.
// dot(a, b) is the product of two words.
template <int kWords, typename Dot>
__forceinline__ void mma_words(const char* name, Dot dot, int32_t (&c)[4], const uint32_t (&a)[4],
                               uint32_t b0, uint32_t b1) {
  struct In {
    int32_t c[4];
    uint32_t a[4], b[2];
  } in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  struct Out {
    int32_t c[4];
  };
  const Out out = hostcuda::collective<Out>(name, in, [dot](const auto& lanes, auto& results) {
    uint32_t a[16][8], b[8][8];  // words by row, and by column
    for (int lane = 0; lane < hostcuda::kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        a[g][t + 4 * half] = lanes[lane].a[2 * half];
        a[g + 8][t + 4 * half] = lanes[lane].a[2 * half + 1];
        b[g][t + 4 * half] = lanes[lane].b[half];
      }
    }
    for (int lane = 0; lane < hostcuda::kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        int sum = lanes[lane].c[i];
        for (int w = 0; w < kWords; ++w) sum += dot(a[row][w], b[column][w]);
        results[lane].c[i] = sum;
      }
    }
  });
  std::memcpy(c, out.c, sizeof c);
}

__forceinline__ int common_ones(uint32_t a, uint32_t b) { return __popc(a & b); }

__forceinline__ void mma_b1_256(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_words<8>("mma.m16n8k256.and.popc", common_ones, c, a, b0, b1);
}
__forceinline__ void mma_b1_128(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  mma_words<4>("mma.m16n8k128.and.popc", common_ones, c, a, b, 0);
}

__forceinline__ void mma_16832_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  const auto dot = [](uint32_t codes, uint32_t numbers) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) {
      sum += static_cast<uint8_t>(codes >> i) * static_cast<int8_t>(numbers >> i);
    }
    return sum;
  };
  mma_words<8>("mma.m16n8k32.u8.s8", dot, c, a, b0, b1);
}

template <typename T>
uint32_t pack2(float low, float high) {
  return hostcuda::narrow<T>(low) | static_cast<uint32_t>(hostcuda::narrow<T>(high)) << 16;
}

inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return hostcuda::widen<fp16>(x.bits); }
inline float to_float(bf16 x) { return hostcuda::widen<bf16>(x.bits); }

template <typename T>
T from_float(float x) {
  return T{hostcuda::narrow<T>(x)};
}
template <>
inline float from_float<float>(float x) {
  return x;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline int32_t subtract_saturated(int32_t a, int32_t b) {
  const int64_t d = int64_t{a} - b;
  return static_cast<int32_t>(d < INT32_MIN ? INT32_MIN : d > INT32_MAX ? INT32_MAX : d);
}
inline float round_even(float x) { return std::nearbyint(x); }
inline int32_t small_int(float x) { return static_cast<int32_t>(std::nearbyint(x)); }
inline int64_t floor_to_int64(double x) {
  if (!(x < 0x1p63)) return INT64_MAX;
  return x < -0x1p63 ? INT64_MIN : static_cast<int64_t>(std::floor(x));
}
inline float multiply_rn(float a, float b) {
  volatile float product = a * b;  // out of the compiler's sight, so that nothing fuses with it
  return product;
}

}  // namespace cuda
}  // namespace filbert
