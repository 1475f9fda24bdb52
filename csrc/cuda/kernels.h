// The CUDA kernels as the bindings see them: one function each, that starts work on a stream.
#pragma once

#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "args/bias_gelu.h"
#include "args/gather_rows.h"
#include "args/norm_residual.h"

namespace filbert {

void attn_tiles_cuda(const AttnTilesArgs& args, void* stream);
void attn_varlen_cuda(const AttnVarlenArgs& args, void* stream);
void norm_residual_cuda(const NormResidualArgs& args, void* stream);
void bias_gelu_cuda(const BiasGeluArgs& args, void* stream);
void gather_rows_cuda(const GatherRowsArgs& args, void* stream);

}  // namespace filbert
