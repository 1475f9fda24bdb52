// filbert._C: what was built and what this processor runs. Tensors never pass through here;
// importing it loads libfilbert_ops, which registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/attention/plan.h"
#include "cpu/dispatch/traits.h"
#include "cuda/attn_binary_plan.h"
#include "cuda/attn_varlen_plan.h"
#include "cuda/linear_binary_plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["filbert"] = FILBERT_VERSION;
  info["torch"] = FILBERT_TORCH_VERSION;
  info["compiler"] = FILBERT_COMPILER;
  info["cuda"] = FILBERT_CUDA_VERSION;
  return info;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto isa = filbert::runnable_isas(); isa->name; ++isa) names.emplace_back(isa->name);
  return names;
}

py::dict isa_details() {
  const filbert::VectorTraits& traits = filbert::chosen_vector_traits();
  py::dict details;
  details["isa"] = filbert::isa_in_use().name;
  details["vector_bytes"] = traits.vector_bytes;
  details["bf16_pairs"] = traits.bf16_pairs;
  return details;
}

void select_isa(const std::string& name) {
  if (!filbert::select_isa(name.c_str())) {
    throw py::value_error("no such instruction set here: " + name);
  }
}

py::dict plan_attn_varlen(const std::vector<int32_t>& cu_q, const std::vector<int32_t>& cu_k,
                          int64_t heads, int64_t dim, bool bf16, int64_t threads) {
  if (cu_q.empty() || cu_q.size() != cu_k.size() || heads < 1 || threads < 1) {
    throw py::value_error(
        "plan_attn_varlen: need as many query as key offsets, a head and a thread");
  }
  filbert::AttnVarlenArgs args{};
  args.dtype = bf16 ? filbert::DType::kBFloat16 : filbert::DType::kFloat32;
  args.cu_q = cu_q.data();
  args.cu_k = cu_k.data();
  args.sequences = static_cast<int64_t>(cu_q.size()) - 1;
  args.heads = heads;
  args.dim = dim;
  const filbert::AttnPlan plan = filbert::plan_attn_varlen(args, threads);
  py::list tasks;
  for (const filbert::AttnTask& t : plan.tasks) {
    tasks.append(py::make_tuple(t.sequence, t.head_begin, t.head_end, t.q_begin, t.q_end));
  }
  py::dict result;
  result["tasks"] = tasks;
  result["heads_per_task"] = plan.heads_per_task;
  result["longest_k"] = plan.longest_k;
  result["scratch_bytes"] = plan.scratch_bytes;
  result["multiply_adds"] = plan.multiply_adds;
  return result;
}

py::dict plan_attn_varlen_cuda(int64_t rows_q, int64_t sequences, int64_t heads, int64_t dim,
                               bool float32, bool self_attention) {
  if (rows_q < 0 || sequences < 0 || heads < 1 || dim < 1 || dim > 128) {
    throw py::value_error(
        "plan_attn_varlen_cuda: need rows and sequences of 0 or more, a head, and 1 to 128 "
        "columns");
  }
  filbert::AttnVarlenArgs args{};
  args.dtype = float32 ? filbert::DType::kFloat32 : filbert::DType::kFloat16;
  args.rows_q = rows_q;
  args.sequences = sequences;
  args.heads = heads;
  args.dim = dim;
  args.capacity = filbert::tile_capacity(rows_q, sequences);
  args.self_attention = self_attention;
  const filbert::cuda::LaunchPlan plan = filbert::cuda::plan_attn_varlen(args);
  py::dict result;
  result["blocks"] = plan.blocks;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["tile_dim"] = float32 ? dim : filbert::cuda::attn_tile_dim(dim);
  return result;
}

py::dict plan_linear_binary_cuda(int64_t rows, int64_t outputs, int64_t row_words, int64_t planes,
                                 int64_t multiprocessors, int64_t capability) {
  if (rows < 0 || outputs < 0 || row_words < 0 || planes < 1 || multiprocessors < 1) {
    throw py::value_error(
        "plan_linear_binary_cuda: need sizes of 0 or more, a plane and a multiprocessor");
  }
  filbert::LinearBinaryArgs args{};
  args.rows = rows;
  args.outputs = outputs;
  args.row_words = row_words;
  args.planes = static_cast<int32_t>(planes);
  const auto plan = filbert::cuda::plan_linear_binary(args, multiprocessors, capability);
  py::dict result;
  result["tensor_cores"] = plan.tensor_cores;
  result["tile_rows"] = plan.tile.rows;
  result["tile_outputs"] = plan.tile.outputs;
  result["blocks"] = plan.launch.blocks;
  result["threads"] = plan.launch.threads;
  result["shared_bytes"] = plan.launch.shared_bytes;
  return result;
}

py::dict plan_attn_binary_cuda(int64_t rows, int64_t sequences, int64_t max_seqlen, int64_t heads,
                               int64_t dim, bool table) {
  if (rows < 0 || sequences < 0 || max_seqlen < 0 || heads < 1 || dim < 32 ||
      dim > filbert::kMaxBinaryDim) {
    throw py::value_error(
        "plan_attn_binary_cuda: need sizes of 0 or more, a head, and 32 to 128 columns");
  }
  const int64_t any_table = 0;
  filbert::AttnBinaryArgs args{};
  args.rows = rows;
  args.sequences = sequences;
  args.max_seqlen = max_seqlen;
  args.heads = heads;
  args.dim = dim;
  args.table = table ? &any_table : nullptr;
  const filbert::cuda::LaunchPlan plan = filbert::cuda::plan_attn_binary(args);
  py::dict result;
  result["blocks"] = plan.blocks;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["rows_per_block"] = filbert::cuda::attn_binary_tile_rows(dim);
  result["heads_at_once"] = filbert::cuda::attn_binary_warps(heads);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, instruction-set selection and plans of filbert's compiled library.";
  m.def("build_info", &build_info, "Versions this library was built from.");
  m.def("isas", &isas, "Instruction sets that run here, best first; 'emulated' is for tests.");
  m.def("isa_details", &isa_details, "Vector width and bfloat16 support of the one in use.");
  m.def("isa", [] { return std::string(filbert::isa_in_use().name); }, "The one in use.");
  m.def("select_isa", &select_isa, py::arg("name"), "Makes later CPU kernel calls use another.");
  m.def("plan_attn_varlen", &plan_attn_varlen, py::arg("cu_q"), py::arg("cu_k"), py::arg("heads"),
        py::arg("dim"), py::arg("bf16"), py::arg("threads"),
        "How attn_varlen would cut a call into tasks (sequence, head range, query range).");
  m.def("plan_attn_varlen_cuda", &plan_attn_varlen_cuda, py::arg("rows_q"), py::arg("sequences"),
        py::arg("heads"), py::arg("dim"), py::arg("float32"), py::arg("self_attention"),
        "How attn_varlen would be launched on a GPU. It does not depend on sequence lengths.");
  m.def("plan_linear_binary_cuda", &plan_linear_binary_cuda, py::arg("rows"), py::arg("outputs"),
        py::arg("row_words"), py::arg("planes"), py::arg("multiprocessors"), py::arg("capability"),
        "How linear_binary would be launched on a GPU of a compute capability (10 major + minor).");
  m.def("plan_attn_binary_cuda", &plan_attn_binary_cuda, py::arg("rows"), py::arg("sequences"),
        py::arg("max_seqlen"), py::arg("heads"), py::arg("dim"), py::arg("table"),
        "How attn_binary would be launched on a GPU.");
}
