# Every stem once. What a stem has is found by its name:
#
#   csrc/torch/<stem>.cpp        the binding, compiled once for each kind of device
#   csrc/torch/cpu/<stem>.cpp    the binding of an operator that only the CPU has
#   csrc/cpu/<stem>.cpp          how a call is dealt to threads
#   csrc/cpu/<stem>_kernel.cpp   its kernel, compiled once for each instruction set in COPIES
#   csrc/cuda/<stem>.cu, csrc/cuda/<stem>/*.cu
#
# The lists that this leaves are FILBERT_BINDINGS, FILBERT_CPU_BINDINGS, FILBERT_CPU_SOURCES,
# FILBERT_CUDA_SOURCES, and FILBERT_KERNELS_<isa> for each instruction set.

set(FILBERT_FLOAT_COPIES emulated base avx2 avx512 avx512_bf16)
set(FILBERT_BIT_COPIES emulated base avx2 avx512 avx512_vpopcnt)
set(FILBERT_BYTE_COPIES emulated base avx2 avx2_vnni avx512 avx512_vnni)

# Appends those of the files that are there to a list.
function(filbert_append list)
  foreach(file IN LISTS ARGN)
    if(EXISTS "${PROJECT_SOURCE_DIR}/${file}")
      list(APPEND ${list} "${PROJECT_SOURCE_DIR}/${file}")
    endif()
  endforeach()
  set(${list} "${${list}}" PARENT_SCOPE)
endfunction()

# filbert_stem(<stem> [COPIES <isa>...])
macro(filbert_stem stem)
  cmake_parse_arguments(stem "" "" "COPIES" ${ARGN})
  if(NOT stem_COPIES)
    set(stem_COPIES ${FILBERT_FLOAT_COPIES})
  endif()
  filbert_append(FILBERT_BINDINGS csrc/torch/${stem}.cpp)
  filbert_append(FILBERT_CPU_BINDINGS csrc/torch/cpu/${stem}.cpp)
  filbert_append(FILBERT_CPU_SOURCES csrc/cpu/${stem}.cpp)
  foreach(isa IN LISTS stem_COPIES)
    filbert_append(FILBERT_KERNELS_${isa} csrc/cpu/${stem}_kernel.cpp)
  endforeach()
  file(GLOB stem_parts CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}"
    "${PROJECT_SOURCE_DIR}/csrc/cuda/${stem}/*.cu")
  filbert_append(FILBERT_CUDA_SOURCES csrc/cuda/${stem}.cu ${stem_parts})
endmacro()

filbert_stem(attn_binary COPIES ${FILBERT_BIT_COPIES})
filbert_stem(attn_lowrank)
filbert_stem(attn_varlen)
filbert_stem(bias_gelu)
filbert_stem(embedding_grouped)
filbert_stem(ffn_lowrank)
filbert_stem(gather_rows)
filbert_stem(linear_binary COPIES ${FILBERT_BIT_COPIES})
filbert_stem(linear_dense)
filbert_stem(linear_grouped COPIES ${FILBERT_BYTE_COPIES})
filbert_stem(linear_lowrank)
filbert_stem(norm_residual)
filbert_stem(pack_bits COPIES ${FILBERT_BIT_COPIES})
filbert_stem(quantize_rows)
