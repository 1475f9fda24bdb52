"""What an encoder layer of someone else's is made of, by the names of its roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["LINEARS", "LayerParts"]

#: the parts of a layer that are linear
LINEARS = ("query", "key", "value", "out", "up", "down")


@dataclass(frozen=True)
class LayerParts:
    """The modules and numbers one encoder layer is made of, whatever its family calls them.

    With ``N`` the hidden size, ``H`` heads of ``D`` and ``F`` the inner size of the feed-forward
    part: ``query``, ``key``, ``value`` map N to H*D, ``out`` H*D to N, ``up`` N to F, ``down`` F to
    N. ``attn_norm`` and ``ffn_norm`` follow the residual additions.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    attn_norm: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    ffn_norm: nn.LayerNorm
    num_heads: int
    head_dim: int
    scale: float
    #: the largest dropout probability in the layer; it must be off for the packed layer to be right
    dropout: float = 0.0
    #: where each module lies inside the original layer, for reports
    names: dict[str, str] = field(default_factory=dict)

    def linears(self) -> tuple[nn.Linear, ...]:
        """The six linear modules whose weights are packed, in the order of ``LINEARS``."""
        return (self.query, self.key, self.value, self.out, self.up, self.down)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight and bias of the layer."""
        for module in (*self.linears(), self.attn_norm, self.ffn_norm):
            yield from module.parameters()
