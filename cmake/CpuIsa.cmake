# The copies of the CPU kernels: FILBERT_ISAS, and filbert_cpu_copy, which compiles one.
#
# Every copy lives in its own namespace (FILBERT_ISA), and kernel files use nothing that a linker
# may merge across copies, so code for a newer processor can never run on an older one.
# csrc/cpu/dispatch picks one for each kernel by cpuid.

set(FILBERT_ISA_base_FLAGS "")
set(FILBERT_ISA_avx2_FLAGS -mavx2 -mfma -mf16c)
set(FILBERT_ISA_avx512_FLAGS -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512)
set(FILBERT_ISA_avx512_bf16_FLAGS ${FILBERT_ISA_avx512_FLAGS} -mavx512bf16)
# Population counts of whole vectors, for the kernels over bits; the others gain nothing from it.
set(FILBERT_ISA_avx512_vpopcnt_FLAGS ${FILBERT_ISA_avx512_FLAGS} -mavx512vpopcntdq)
# Four products of bytes and their sum in one instruction, for the kernels over bytes.
set(FILBERT_ISA_avx512_vnni_FLAGS ${FILBERT_ISA_avx512_FLAGS} -mavx512vnni)
set(FILBERT_ISA_avx2_vnni_FLAGS ${FILBERT_ISA_avx2_FLAGS} -mavxvnni)
# 512-bit vectors and bf16 pairs spelled in portable code: the tests of the widest kernels run on
# processors that do not have them.
set(FILBERT_ISA_emulated_FLAGS -DFILBERT_VECTOR_BYTES=64 -DFILBERT_TILE_ROWS=12 -DFILBERT_BF16_PAIRS=1)

set(FILBERT_ISAS base)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND FILBERT_ISAS avx2 avx2_vnni avx512 avx512_bf16 avx512_vpopcnt avx512_vnni)
endif()
if(FILBERT_EMULATED_ISA)
  list(APPEND FILBERT_ISAS emulated)
endif()

# filbert_cpu_copy(<target> <isa> <file>...): whatever links <target>, a library of objects, gets the
# files' copy for that instruction set too.
function(filbert_cpu_copy target isa)
  add_library(${target}_${isa} OBJECT ${ARGN})
  target_include_directories(${target}_${isa} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_compile_definitions(${target}_${isa} PRIVATE FILBERT_ISA=${isa})
  target_compile_options(${target}_${isa} PRIVATE
    -O3 -Wall -Wextra -Wno-psabi -ffp-contract=fast -fno-math-errno ${FILBERT_ISA_${isa}_FLAGS})
  target_sources(${target} INTERFACE $<TARGET_OBJECTS:${target}_${isa}>)
  string(TOUPPER ${isa} upper)
  target_compile_definitions(${target} PRIVATE FILBERT_HAVE_${upper}=1)
endfunction()
