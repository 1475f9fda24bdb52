// The harness on trial: kernels that are wrong in one way each, kernels that exercise one wrapper
// each, and the switches that the tests turn. Registered beside the operators.
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/device/launch.cuh"
#include "cuda/device/once.h"
#include "cuda/device/ptx.cuh"
#include "torch/shared/device.h"

namespace filbert {
namespace {

using cuda::launch;

// x [64] float32, out [64] float32, one block of 64 threads.
struct Sheet {
  const float* x;
  float* out;
};

float* shared_floats() { return reinterpret_cast<float*>(cuda::shared_memory()); }

void reversed(const Sheet s) {  // right: the one that the wrong ones are compared with
  float* shared = shared_floats();
  shared[threadIdx.x] = s.x[threadIdx.x];
  __syncthreads();
  s.out[threadIdx.x] = shared[63 - threadIdx.x];
}
void race(const Sheet s) {  // no barrier between a write and another thread's read
  float* shared = shared_floats();
  shared[threadIdx.x] = 0.0f;
  __syncthreads();
  shared[threadIdx.x] = s.x[threadIdx.x];
  s.out[threadIdx.x] = shared[63 - threadIdx.x];
}
void uninitialised(const Sheet s) {
  s.out[threadIdx.x] = shared_floats()[threadIdx.x] + s.x[threadIdx.x];
}
void unwritten(const Sheet s) {
  if (threadIdx.x != 5) s.out[threadIdx.x] = s.x[threadIdx.x];
}
void read_past(const Sheet s) { s.out[threadIdx.x] = s.x[threadIdx.x + 8]; }
void write_past(const Sheet s) { s.out[threadIdx.x + 8] = 1.0f; }
void write_before(const Sheet s) { s.out[static_cast<int>(threadIdx.x) - 1] = 1.0f; }
void write_input(const Sheet s) { const_cast<float*>(s.x)[threadIdx.x] = 1.0f; }
void wide_read_past(const Sheet s) {
  const uint4 v = cuda::load_16(s.x + threadIdx.x / 4 * 4 + 4);
  std::memcpy(&s.out[threadIdx.x], &v.x, 4);
}
void shared_past(const Sheet) { shared_floats()[threadIdx.x + 60] = 1.0f; }
void shared_before(const Sheet) { shared_floats()[static_cast<int>(threadIdx.x) - 1] = 1.0f; }
void shared_address_past(const Sheet) {
  cuda::store_shared_4(cuda::shared_address(shared_floats()) + 256 + 4 * threadIdx.x, 1);
}
void half_a_barrier(const Sheet) {
  if (threadIdx.x < 40) __syncthreads();
}
void early_return(const Sheet s) {
  if (threadIdx.x == 63) return;
  s.out[threadIdx.x] = s.x[threadIdx.x];
  __syncthreads();
}
void half_a_shuffle(const Sheet s) {
  float x = s.x[threadIdx.x];
  if (threadIdx.x % 2 == 0) x = __shfl_xor_sync(0xffffffffu, x, 2);
  s.out[threadIdx.x] = x;
}
void two_collectives(const Sheet s) {
  float x = s.x[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    __syncwarp();
  }
  s.out[threadIdx.x] = x;
}
void one_collective_twice(const Sheet s) {  // the same instruction, at two places
  float x = s.x[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    x = __shfl_xor_sync(0xffffffffu, x, 1) + 1.0f;
  } else {
    x = __shfl_xor_sync(0xffffffffu, x, 1) * 2.0f;
  }
  s.out[threadIdx.x] = x;
}
void misaligned_load(const Sheet s) {
  const uint4 v = cuda::load_16(s.x + 1);
  std::memcpy(&s.out[threadIdx.x], &v.x, 4);
}
void misaligned_copy(const Sheet s) {
  cuda::cp_async_16(cuda::shared_address(shared_floats()) + 8, s.x, true);
}
void fetch(const Sheet& s) {
  if (threadIdx.x < 16) {
    const int first = static_cast<int>(threadIdx.x) * 4;
    cuda::cp_async_16(cuda::shared_address(shared_floats() + first), s.x + first, true);
  }
  cuda::cp_async_commit();
}
void no_wait(const Sheet s) {
  fetch(s);
  __syncthreads();
  s.out[threadIdx.x] = shared_floats()[threadIdx.x];
  cuda::cp_async_wait<0>();
}
void waits_for_too_few(const Sheet s) {
  fetch(s);
  cuda::cp_async_wait<1>();
  __syncthreads();
  s.out[threadIdx.x] = shared_floats()[threadIdx.x];
  cuda::cp_async_wait<0>();
}
void never_waits(const Sheet s) { fetch(s); }
void overwrites_what_is_read(const Sheet s) {  // the next copy begins before all have read this one
  fetch(s);
  cuda::cp_async_wait<0>();
  __syncthreads();
  const float x = shared_floats()[63 - threadIdx.x];
  fetch(s);
  __syncwarp();
  s.out[threadIdx.x] = x;
  cuda::cp_async_wait<0>();
}

const std::map<std::string, void (*)(Sheet)>& sheets() {
  static const std::map<std::string, void (*)(Sheet)> all = {
#define KERNEL(name) {#name, name}
      KERNEL(reversed),
      KERNEL(race),
      KERNEL(uninitialised),
      KERNEL(unwritten),
      KERNEL(read_past),
      KERNEL(write_past),
      KERNEL(write_before),
      KERNEL(write_input),
      KERNEL(wide_read_past),
      KERNEL(shared_past),
      KERNEL(shared_before),
      KERNEL(shared_address_past),
      KERNEL(half_a_barrier),
      KERNEL(early_return),
      KERNEL(half_a_shuffle),
      KERNEL(two_collectives),
      KERNEL(one_collective_twice),
      KERNEL(misaligned_load),
      KERNEL(misaligned_copy),
      KERNEL(no_wait),
      KERNEL(waits_for_too_few),
      KERNEL(never_waits),
      KERNEL(overwrites_what_is_read),
#undef KERNEL
  };
  return all;
}

Tensor sheet(Tensor x, std::string name) {
  const auto found = sheets().find(name);
  if (found == sheets().end()) throw std::runtime_error("no such kernel: " + name);
  Tensor out = torch::stable::new_empty(x, {64});
  Call call(x);
  const Sheet args{call.read<float>(x), call.write<float>(out)};
  launch(name.c_str(), found->second, {1, 64, 256}, call.stream(), args);
  call.finish();
  return out;
}

void launch_of(int64_t blocks, int64_t threads, int64_t shared_bytes) {
  launch("nothing", +[](int) {}, {blocks, threads, shared_bytes}, nullptr, 0);
}

// --- one wrapper at a time ---

// c [16, 8] = a [16, 16] b [16, 8] + c by ldmatrix, ldmatrix.trans and mma.m16n8k16.
template <typename T>
struct Product {
  const T* a;
  const T* b;
  float* c;
};

template <typename T>
void product_kernel(const Product<T> p) {
  T* shared = reinterpret_cast<T*>(cuda::shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) shared[i] = p.a[i];
  for (int i = lane; i < 256; i += 32)
    shared[256 + i] = i % 16 < 8 ? p.b[i / 16 * 8 + i % 16] : T{};
  __syncwarp();
  uint32_t a[4], b[4];
  cuda::ldmatrix_x4(a, cuda::shared_address(shared + lane % 16 * 16 + lane / 16 * 8));
  cuda::ldmatrix_x4_trans(b, cuda::shared_address(shared + 256 + lane % 16 * 16 + lane / 16 * 8));
  float* c = p.c + lane / 4 * 8 + lane % 4 * 2;
  float d[4] = {c[0], c[1], c[64], c[65]};
  cuda::mma_16816<T>(d, a, b[0], b[1]);
  c[0] = d[0], c[1] = d[1], c[64] = d[2], c[65] = d[3];
}

template <typename T>
void run_product(const Tensor& a, const Tensor& b, Tensor& c) {
  Call call(a);
  const Product<T> args{call.read<T>(a), call.read<T>(b), call.update<float>(c)};
  launch("product", product_kernel<T>, {1, 32, 1024}, call.stream(), args);
  call.finish();
}

void product_(Tensor a, Tensor b, Tensor c) {
  dtype_of(a, "product_", "a") == DType::kFloat16 ? run_product<cuda::fp16>(a, b, c)
                                                  : run_product<cuda::bf16>(a, b, c);
}

// c [16, 8] += popcount(a [16, words] & b [8, words]) by the one-bit mma of that width, 8 or 4.
struct BitProduct {
  const uint32_t* a;
  const uint32_t* b;
  int32_t* c;
};

template <int kWords>
void bit_product_kernel(const BitProduct p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto a = [&](int row, int word) { return p.a[row * kWords + word]; };
  const auto b = [&](int word) { return p.b[g * kWords + word]; };
  int32_t* c = p.c + g * 8 + t * 2;
  int32_t d[4] = {c[0], c[1], c[64], c[65]};
  if (kWords == 8) {
    const uint32_t all[4] = {a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4)};
    cuda::mma_b1_256(d, all, b(t), b(t + 4));
  } else {
    cuda::mma_b1_128(d, a(g, t), a(g + 8, t), b(t));
  }
  c[0] = d[0], c[1] = d[1], c[64] = d[2], c[65] = d[3];
}

void bit_product_(Tensor a, Tensor b, Tensor c) {
  Call call(a);
  const BitProduct args{call.read<uint32_t>(a), call.read<uint32_t>(b), call.update<int32_t>(c)};
  launch("bit_product", a.size(1) == 8 ? bit_product_kernel<8> : bit_product_kernel<4>, {1, 32, 0},
         call.stream(), args);
  call.finish();
}

// c [16, 8] += a [16, 32] b [8, 32]^T, of unsigned and signed bytes.
void byte_product_kernel(const BitProduct p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  int32_t* c = p.c + g * 8 + t * 2;
  int32_t d[4] = {c[0], c[1], c[64], c[65]};
  const uint32_t a[4] = {p.a[g * 8 + t], p.a[(g + 8) * 8 + t], p.a[g * 8 + t + 4],
                         p.a[(g + 8) * 8 + t + 4]};
  cuda::mma_16832_u8s8(d, a, p.b[g * 8 + t], p.b[g * 8 + t + 4]);
  c[0] = d[0], c[1] = d[1], c[64] = d[2], c[65] = d[3];
}

void byte_product_(Tensor a, Tensor b, Tensor c) {
  Call call(a);
  const BitProduct args{call.read<uint32_t>(a), call.read<uint32_t>(b), call.update<int32_t>(c)};
  launch("byte_product", byte_product_kernel, {1, 32, 0}, call.stream(), args);
  call.finish();
}

// x [n] float32 -> [n] of `like`'s dtype, by from_float.
Tensor narrowed(Tensor x, Tensor like) {
  Tensor out = torch::stable::new_empty(like, {x.size(0)});
  const float* from = static_cast<const float*>(x.const_data_ptr());
  void* to = out.mutable_data_ptr();
  const bool half = dtype_of(like, "narrowed", "like") == DType::kFloat16;
  for (int64_t i = 0; i < x.size(0); ++i) {
    if (half) {
      static_cast<cuda::fp16*>(to)[i] = cuda::from_float<cuda::fp16>(from[i]);
    } else {
      static_cast<cuda::bf16*>(to)[i] = cuda::from_float<cuda::bf16>(from[i]);
    }
  }
  return out;
}

// x [n] float16 or bfloat16 -> [n] float32, by to_float.
Tensor widened(Tensor x) {
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const void* from = x.const_data_ptr();
  const bool half = dtype_of(x, "widened", "x") == DType::kFloat16;
  for (int64_t i = 0; i < x.size(0); ++i) {
    to[i] = half ? cuda::to_float(static_cast<const cuda::fp16*>(from)[i])
                 : cuda::to_float(static_cast<const cuda::bf16*>(from)[i]);
  }
  return out;
}

// How often a device is asked for an attribute that is `value`, in three calls.
int64_t asked(int64_t device, int64_t value) {
  cuda::OncePerDevice known;
  int64_t count = 0;
  for (int call = 0; call < 3; ++call) {
    const int got = known.get(static_cast<int>(device), [&] {
      ++count;
      return static_cast<int>(value);
    });
    if (got != value) throw std::runtime_error("another attribute: " + std::to_string(got));
  }
  return count;
}

void set_seed(int64_t seed) { hostcuda::set_seed(static_cast<uint64_t>(seed)); }
void set_capability(int64_t capability) { hostcuda::set_capability(static_cast<int>(capability)); }
void record(bool on) { hostcuda::record(on); }
void replay() { hostcuda::replay(); }
std::string fibers() {
#if HOSTCUDA_BOOST
  return "boost";
#else
  return "ucontext";
#endif
}

}  // namespace
}  // namespace filbert

STABLE_TORCH_LIBRARY_FRAGMENT(filbert_hostcuda, m) {
  m.def("sheet(Tensor x, str name) -> Tensor");
  m.def("launch_of(int blocks, int threads, int shared_bytes) -> ()");
  m.def("product_(Tensor a, Tensor b, Tensor(a!) c) -> ()");
  m.def("bit_product_(Tensor a, Tensor b, Tensor(a!) c) -> ()");
  m.def("byte_product_(Tensor a, Tensor b, Tensor(a!) c) -> ()");
  m.def("narrowed(Tensor x, Tensor like) -> Tensor");
  m.def("widened(Tensor x) -> Tensor");
  m.def("asked(int device, int value) -> int");
  m.def("set_seed(int seed) -> ()");
  m.def("set_capability(int capability) -> ()");
  m.def("record(bool on) -> ()");
  m.def("replay() -> ()");
  m.def("fibers() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(filbert_hostcuda, CompositeExplicitAutograd, m) {
  m.impl("sheet", TORCH_BOX(&filbert::sheet));
  m.impl("launch_of", TORCH_BOX(&filbert::launch_of));
  m.impl("product_", TORCH_BOX(&filbert::product_));
  m.impl("bit_product_", TORCH_BOX(&filbert::bit_product_));
  m.impl("byte_product_", TORCH_BOX(&filbert::byte_product_));
  m.impl("narrowed", TORCH_BOX(&filbert::narrowed));
  m.impl("widened", TORCH_BOX(&filbert::widened));
  m.impl("asked", TORCH_BOX(&filbert::asked));
  m.impl("set_seed", TORCH_BOX(&filbert::set_seed));
  m.impl("set_capability", TORCH_BOX(&filbert::set_capability));
  m.impl("record", TORCH_BOX(&filbert::record));
  m.impl("replay", TORCH_BOX(&filbert::replay));
  m.impl("fibers", TORCH_BOX(&filbert::fibers));
}
