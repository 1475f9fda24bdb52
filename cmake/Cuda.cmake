# libfilbert_cuda: the CUDA side, a library of its own so that the CPU side loads on every torch.
#
# FILBERT_CUDA=AUTO builds it when nvcc is there, ON insists, OFF does not look. The headers of a
# CPU-only torch are enough: the library links against an empty stand-in with libtorch_cuda's name,
# and the loader binds the real one. Sets FILBERT_CUDA_VERSION, empty when it is not built.

set(FILBERT_CUDA_VERSION "")
if(FILBERT_CUDA STREQUAL "OFF")
  message(STATUS "filbert: CUDA kernels switched off (FILBERT_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" nvcc_says "${nvcc_says}")
  if(CMAKE_MATCH_1 VERSION_LESS 12.0)
    if(FILBERT_CUDA STREQUAL "ON")
      message(FATAL_ERROR "FILBERT_CUDA=ON, but ${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_MATCH_1}; need 12.0 or newer.")
    endif()
    message(STATUS "filbert: nvcc ${CMAKE_MATCH_1} is older than 12.0, building without CUDA kernels")
    return()
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  if(FILBERT_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "FILBERT_CUDA=ON, but no CUDA compiler was found. Put nvcc on PATH or set CUDACXX, or build with FILBERT_CUDA=AUTO.")
  endif()
  message(STATUS "filbert: no nvcc found, building without CUDA kernels")
  return()
endif()

# Set before enable_language, which would otherwise pick the toolkit's oldest. The last one carries
# PTX as well, for GPUs newer than this list.
set(FILBERT_CUDA_ARCHS "80-real;86-real;89-real;90" CACHE STRING
  "GPU architectures to build for, as in CMAKE_CUDA_ARCHITECTURES: numbers, or native")
foreach(architecture IN LISTS FILBERT_CUDA_ARCHS)
  if(NOT architecture MATCHES "^([0-9]+[0-9][af]?(-real|-virtual)?|native)$")
    message(FATAL_ERROR
      "FILBERT_CUDA_ARCHS: got ${architecture}, need numbers such as 80-real or 90a, or native. "
      "Try \"80-real;90\".")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES ${FILBERT_CUDA_ARCHS})
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
set(FILBERT_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
# What is built is told to those who load it, by number.
if("native" IN_LIST FILBERT_CUDA_ARCHS AND NOT CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "^[0-9]")
  message(FATAL_ERROR
    "FILBERT_CUDA_ARCHS: got native, need a GPU in this machine that nvcc can see "
    "(${CMAKE_CUDA_ARCHITECTURES_NATIVE}). Try numbers, such as \"80-real;90\".")
endif()
string(REPLACE "native" "${CMAKE_CUDA_ARCHITECTURES_NATIVE}" architectures "${FILBERT_CUDA_ARCHS}")
message(STATUS "filbert: CUDA ${FILBERT_CUDA_VERSION}, architectures ${architectures}")

file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/stub/empty.c" "")
enable_language(C)
add_library(torch_cuda_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub/empty.c")
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

add_library(filbert_cuda SHARED
  csrc/cuda/device/architectures.cu
  ${FILBERT_CUDA_SOURCES}
  ${FILBERT_BINDINGS}
)
target_include_directories(filbert_cuda PRIVATE csrc)
string(REPLACE ";" " " architectures "${architectures}")
target_compile_definitions(filbert_cuda PRIVATE
  USE_CUDA FILBERT_CUDA FILBERT_CUDA_ARCHITECTURES="sm ${architectures}")
target_compile_options(filbert_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
if(FILBERT_KEEP_REPORTS)  # for those who look into the kernels: profilers show source lines too
  target_compile_options(filbert_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
  set_target_properties(filbert_cuda PROPERTIES
    CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${PROJECT_SOURCE_DIR}/cmake/keep_report.py")
endif()
target_link_libraries(filbert_cuda PRIVATE torch_stable torch_cuda_stub)
target_link_options(filbert_cuda PRIVATE -Wl,--no-as-needed)
set_target_properties(filbert_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden SKIP_BUILD_RPATH ON)
install(TARGETS filbert_cuda LIBRARY DESTINATION filbert/lib)
