"""Packed attention that others wrote for GPUs: what filbert has to beat there."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .baselines import first_line, forget_compiled, time_limit
from .timing import Contestant, Unavailable

if TYPE_CHECKING:
    from .cases.attn_varlen import Mix

VARLEN_ATTN = "varlen_attn"
FLASH_ATTN = "flash-attn"
FLEX_ATTENTION = "FlexAttention"
#: seconds after which compiling FlexAttention is given up
COMPILE_LIMIT_S = 120.0


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """``cu_seqlens``, int32 ``[B+1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def _sixteen_bit(qkv: Tensor, name: str) -> None:
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"{name} computes in float16 and bfloat16 only")


def _on_views_or_copies(
    name: str, call: Callable[[Tensor, Tensor, Tensor], Any], qkv: Tensor
) -> Contestant:
    """A contestant over the views of the one QKV buffer, as filbert takes them.

    One that refuses them gets contiguous copies, made beforehand and not timed, and a note.
    """
    q, k, v = qkv.unbind(1)
    note = ""
    try:
        call(q, k, v)
    except Exception as error:
        why = first_line(error)
        q, k, v = (t.contiguous() for t in (q, k, v))
        try:
            call(q, k, v)
        except Exception as again:
            raise Unavailable(f"{type(again).__name__}: {first_line(again)}") from again
        note = f"on contiguous copies, not timed: {why[:80]}"

    def result(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    return Contestant(name, lambda: call(q, k, v), result, note)


def varlen_attn(mix: Mix, qkv: Tensor) -> Contestant:
    """PyTorch's own packed attention, which is FlashAttention."""
    _sixteen_bit(qkv, VARLEN_ATTN)
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        raise Unavailable(
            f"torch {torch.__version__} has no torch.nn.attention.varlen: {first_line(error)}"
        ) from error
    ends, longest = offsets(mix.lengths, qkv.device), mix.maximum
    # Only what every version takes, by position; all of them scale by D ** -0.5 and see all keys.
    return _on_views_or_copies(
        VARLEN_ATTN, lambda q, k, v: function(q, k, v, ends, ends, longest, longest), qkv
    )


def flash_attn(mix: Mix, qkv: Tensor) -> Contestant:
    """The flash-attn package, where somebody installed it."""
    _sixteen_bit(qkv, FLASH_ATTN)
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    try:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
    except Exception as error:  # built for another torch, it fails in many ways
        raise Unavailable(f"flash-attn cannot be imported: {first_line(error)}") from error
    ends, longest = offsets(mix.lengths, qkv.device), mix.maximum
    return _on_views_or_copies(
        FLASH_ATTN, lambda q, k, v: function(q, k, v, ends, ends, longest, longest), qkv
    )


def document_mask(lengths: Sequence[int], device: torch.device) -> Any:
    """FlexAttention's block mask under which a row sees the rows of its own sequence."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths)
    ).to(device)

    def same(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return sequence[row] == sequence[key]

    total = len(sequence)
    return flex.create_block_mask(same, None, None, total, total, device=device)


def flex_attention(mix: Mix, qkv: Tensor) -> Contestant:
    """FlexAttention, compiled, over all packed rows as one long sequence.

    Its block mask is made once per forward and shared by all layers, so it is not timed.
    """
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))  # [1, H, T, D]
    try:
        flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
        mask = document_mask(mix.lengths, qkv.device)
        forget_compiled()  # every mix has its own number of rows
        compiled = torch.compile(flex, dynamic=False)
        with time_limit(COMPILE_LIMIT_S, "compilation"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(q, k, v, block_mask=mask)
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {first_line(error)}") from error
    return Contestant(
        FLEX_ATTENTION,
        lambda: compiled(q, k, v, block_mask=mask),
        lambda value: value[0].transpose(0, 1),
        "the block mask is not timed",
    )
