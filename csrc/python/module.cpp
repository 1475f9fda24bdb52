// filbert._C: what was built and what this processor runs. Tensors never pass through here; importing
// it loads libfilbert_ops, which registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction-set selection of filbert's compiled library.";
  m.def("build_info", [] {
    py::dict info;
    info["filbert"] = FILBERT_VERSION;
    info["torch"] = FILBERT_TORCH_VERSION;
    info["compiler"] = FILBERT_COMPILER;
    return info;
  }, "Versions this library was built from.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (auto isa = filbert::runnable_isas(); *isa; ++isa) names.emplace_back((*isa)->isa);
    return names;
  }, "Instruction sets that run on this processor, best first; 'emulated' is for tests.");
  m.def("isa", [] { return std::string(filbert::cpu_kernels().isa); }, "The instruction set in use.");
  m.def("isa_details", [] {
    const filbert::CpuKernels& kernels = filbert::cpu_kernels();
    py::dict details;
    details["isa"] = kernels.isa;
    details["vector_bytes"] = kernels.vector_bytes;
    details["bf16_pairs"] = kernels.bf16_pairs;
    return details;
  }, "Vector width and bfloat16 support of the instruction set in use.");
  m.def("select_isa", [](const std::string& name) {
    if (!filbert::select_isa(name.c_str())) throw py::value_error("no such instruction set here: " + name);
  }, py::arg("name"), "Makes every later CPU kernel call use this instruction set.");
}
