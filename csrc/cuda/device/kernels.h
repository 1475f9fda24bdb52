// The CUDA kernels as the bindings see them: one function each, that starts work on a stream.
#pragma once

#include "args/attn_binary.h"
#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "args/bias_gelu.h"
#include "args/gather_rows.h"
#include "args/linear_binary.h"
#include "args/norm_residual.h"
#include "args/pack_bits.h"

namespace filbert {

void attn_tiles_cuda(const AttnTilesArgs& args, void* stream);
void attn_varlen_cuda(const AttnVarlenArgs& args, void* stream);
void norm_residual_cuda(const NormResidualArgs& args, void* stream);
void bias_gelu_cuda(const BiasGeluArgs& args, void* stream);
void gather_rows_cuda(const GatherRowsArgs& args, void* stream);
void pack_bits_cuda(const PackBitsArgs& args, void* stream);
void linear_binary_cuda(const LinearBinaryArgs& args, void* stream);
void attn_binary_cuda(const AttnBinaryArgs& args, void* stream);

}  // namespace filbert
