"""One documented function per operator.

Every function calls ``torch.ops.filbert.<name>``, so that autograd, ``torch.compile`` and
``torch.export`` see one opaque operator. Where the compiled library is missing, the function runs
the operator's reference instead and says so once. Either way it raises a RuntimeError where a
gradient of an operand would be recorded, which no kernel has.

A module of this folder is a stem: the public functions, their eager references, their fakes and
what :func:`filbert.explain` says of a call. Its name has an underscore since one of its functions
has the stem's name.
"""

from .. import _load
from ._attn_binary import attn_binary, softmax_table
from ._attn_lowrank import attn_lowrank, pack_heads
from ._attn_tiles import attn_tiles
from ._attn_varlen import attn_varlen, head_dims
from ._bias_gelu import bias_gelu_
from ._embedding_grouped import embedding_grouped, pack_table, unpack_table
from ._ffn_lowrank import ffn_lowrank, most_rank, pad_factor
from ._gather_rows import gather_rows
from ._linear_binary import linear_binary, linear_binary_bits
from ._linear_dense import PANEL, linear_dense, pack_dense, unpack_dense
from ._linear_grouped import (
    FIELDS,
    GROUP_SIZES,
    grouped_offsets,
    grouped_totals,
    linear_grouped,
    linear_grouped_codes,
    pack_grouped,
    pack_groups,
    unpack_grouped,
)
from ._linear_lowrank import LEAST_GAIN, linear_lowrank
from ._norm_residual import norm_residual, norm_residual_, norm_residual_codes
from ._pack_bits import pack_bits, pack_codes
from ._quantize_rows import quantize_rows
from .shared.operator import register_namespace

__all__ = [
    "FIELDS",
    "GROUP_SIZES",
    "LEAST_GAIN",
    "PANEL",
    "attn_binary",
    "attn_lowrank",
    "attn_tiles",
    "attn_varlen",
    "bias_gelu_",
    "embedding_grouped",
    "ffn_lowrank",
    "gather_rows",
    "grouped_offsets",
    "grouped_totals",
    "head_dims",
    "linear_binary",
    "linear_binary_bits",
    "linear_dense",
    "linear_grouped",
    "linear_grouped_codes",
    "linear_lowrank",
    "most_rank",
    "norm_residual",
    "norm_residual_",
    "norm_residual_codes",
    "pack_bits",
    "pack_codes",
    "pack_dense",
    "pack_grouped",
    "pack_groups",
    "pack_heads",
    "pack_table",
    "pad_factor",
    "quantize_rows",
    "softmax_table",
    "unpack_dense",
    "unpack_grouped",
    "unpack_table",
]

if _load.have_ops():
    register_namespace("filbert")
