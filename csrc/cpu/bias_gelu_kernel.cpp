// GELU(x + bias) over dense rows, in place. Built once per instruction set.
#include "cpu/bias_gelu_kernel.h"
#include "cpu/simd/activations.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

template <typename T, bool kTanh>
void rows(const BiasGeluArgs& args, int64_t begin, int64_t end) {
  const auto gelu = [](VecF x) { return kTanh ? gelu_tanh(x) : gelu_erf(x); };
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t n = args.width;
  const int64_t whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    T* x = static_cast<T*>(args.x) + r * n;
    for (int64_t i = 0; i < whole; i += kLanes) {
      VecF value = load(x + i);
      if (bias) value += load(bias + i);
      store(x + i, gelu(value));
    }
    if (whole < n) {
      VecF value = load_first(x + whole, n - whole);
      if (bias) value += load_first(bias + whole, n - whole);
      store_first(x + whole, gelu(value), n - whole);
    }
  }
}

void gelu_rows(const BiasGeluArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kFloat32) {
    args.tanh ? rows<float, true>(args, begin, end) : rows<float, false>(args, begin, end);
  } else {
    args.tanh ? rows<bf16, true>(args, begin, end) : rows<bf16, false>(args, begin, end);
  }
}

}  // namespace

const BiasGeluKernel bias_gelu = {gelu_rows};

}  // namespace FILBERT_ISA
}  // namespace filbert
