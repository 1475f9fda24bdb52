# The target torch_stable: what a library needs to register operators over LibTorch's stable ABI.
#
# find_package(Torch) is avoided on purpose: with a CUDA build of torch and no full CUDA toolkit it
# is fatal, and it injects compiler flags. The stable ABI needs one include folder and one library.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import torch, pathlib; print(pathlib.Path(torch.__file__).parent.as_posix(), torch.__version__, sep=';')"
  OUTPUT_VARIABLE torch_place
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_failed
)
if(torch_failed)
  message(FATAL_ERROR
    "filbert needs torch>=2.10 in the Python that builds it (${Python_EXECUTABLE}), and importing it failed. "
    "Try 'pip install torch', then build again.")
endif()
list(GET torch_place 0 torch_root)
list(GET torch_place 1 FILBERT_TORCH_VERSION)
message(STATUS "filbert: built against torch ${FILBERT_TORCH_VERSION}, runs on torch 2.10 and later")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_root}/include")
target_link_libraries(torch_stable INTERFACE "${torch_root}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")
# 2.10 is the first release whose stable ABI has parallel_for and the allocation calls used here.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
