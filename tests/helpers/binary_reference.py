"""BiBERT, BiT and BinaryBERT as their papers write them, padded and eager, one function for each
formula; and checkpoints laid out as the published ones. Nothing of filbert is used here.

``sign`` is an argument throughout: ``torch.sign``, or :func:`below` and :func:`above`, which are
never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Sign = Callable[[Tensor], Tensor]

#: hidden 64 in 2 heads; an inner size that fills no word of bits; small enough for every test
SIZES = {"vocab": 53, "hidden": 64, "heads": 2, "inner": 80, "layers": 2, "positions": 24}
CONFIG = {"num_attention_heads": 2}
#: of a BinaryBERT of learned steps, whose codes lie around 0 everywhere
FEW_BITS = {**CONFIG, "input_bits": 8, "sym_quant_ffn_attn": True, "weight_layerwise": False}


def below(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def above(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def bibert_weight(w: Tensor) -> Tensor:
    """alpha sign(W - mean(W)), both by row; alpha of the raw weight."""
    return w.abs().mean(1, keepdim=True) * torch.sign(w - w.mean(1, keepdim=True))


def bit_weight(w: Tensor) -> Tensor:
    """alpha sign(W - mean(W)), both of the whole tensor."""
    return w.abs().mean() * torch.sign(w - w.mean())


def bit_table(w: Tensor) -> Tensor:
    """The embedding's: alpha by row, the mean of the whole table."""
    return w.abs().mean(1, keepdim=True) * torch.sign(w - w.mean())


def binarybert_weight(w: Tensor, layerwise: bool = False) -> Tensor:
    """alpha sign(W), alpha by row or of the whole tensor."""
    return (w.abs().mean() if layerwise else w.abs().mean(1, keepdim=True)) * torch.sign(w)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def bi_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, sign: Sign,
                 choose_zeros: bool = False) -> Tensor:  # fmt: skip
    """bool(sign(Q) sign(K)^T / sqrt(d) + mask) sign(V): an integer."""
    qs, ks, vs = (split_heads(sign(t), heads) for t in (q, k, v))
    scores = qs @ ks.transpose(-1, -2) / math.sqrt(qs.shape[-1]) + mask
    chosen = scores >= 0 if choose_zeros else scores > 0
    return merge_heads(chosen.to(vs.dtype) @ vs)


def bit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, sign: Sign,
                  scales: dict[str, float]) -> Tensor:  # fmt: skip
    """Softmax of elastic scores, binarized to {0, a}, times elastic values. a is taken out of both
    products, so that what is 0 is exactly 0."""
    qs, ks, vs = (split_heads(sign(t), heads) for t in (q, k, v))
    unit = scales["query"] * scales["key"] / math.sqrt(qs.shape[-1])
    probs = torch.softmax(qs @ ks.transpose(-1, -2) * unit + mask, -1)
    bits = (probs / scales["attn"]).round().clamp(0, 1)
    return merge_heads(bits @ vs) * (scales["attn"] * scales["value"])


def quantise(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    return scale * (x / scale).round().clamp(low, high)


class Reference:
    """A whole model over a published state dict without prefixes, in float64 (or ``dtype``).

    ``symmetric`` and ``layerwise`` are BinaryBERT's: without the first it has a ReLU, and codes of
    what is never negative count from 0.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        scheme: str,
        sign: Sign = torch.sign,
        dtype: torch.dtype = torch.float64,
        choose_zeros: bool = False,
        symmetric: bool = True,
        layerwise: bool = False,
    ) -> None:
        self.state = {
            k.removeprefix("module.").removeprefix("bert.").replace("gamma", "weight")
            .replace("beta", "bias"): v.to(dtype)
            for k, v in state.items()
        }  # fmt: skip
        self.scheme, self.sign, self.choose_zeros = scheme, sign, choose_zeros
        self.symmetric, self.layerwise = symmetric, layerwise
        self.heads = SIZES["heads"]
        #: name -> what each layer computed on the way
        self.seen: dict[str, list[Tensor]] = {}

    def note(self, name: str, x: Tensor) -> Tensor:
        self.seen.setdefault(name, []).append(x)
        return x

    def scalar(self, name: str) -> float:
        return max(float(self.state[name]), 1e-5)

    def linear(self, name: str, x: Tensor, unsigned: bool = False) -> Tensor:
        s = self.state
        if self.scheme == "bibert":
            y = F.linear(self.sign(x), bibert_weight(s[f"{name}.weight"]))
        elif self.scheme == "bit":
            a = self.scalar(f"{name}.input_clip_val")
            moved = x + s[f"{name}.move.bias"]
            codes = (moved / a).round().clamp(0, 1) if unsigned else self.sign(moved)
            y = a * F.linear(codes, bit_weight(s[f"{name}.weight"]))
        else:
            return self.split_linear(name, x, unsigned)
        return y + s[f"{name}.bias"]

    def split_linear(self, name: str, x: Tensor, unsigned: bool) -> Tensor:
        total: Any = 0
        for part in (f"{name}_1", f"{name}_2") if f"{name}_1.weight" in self.state else (name,):
            low, high = (0, 255) if unsigned else (-128, 127)
            codes = quantise(x, self.scalar(f"{part}.input_clip_val"), low, high)
            weight = binarybert_weight(self.state[f"{part}.weight"], self.layerwise)
            total = total + F.linear(codes, weight, self.state[f"{part}.bias"])
        return total

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def table(self) -> Tensor:
        kind = {"bibert": bibert_weight, "bit": bit_table, "binarybert": binarybert_weight}
        names = [n for n in self.state if n.startswith("embeddings.word_embeddings")]
        return sum((kind[self.scheme](self.state[n]) for n in names), start=torch.zeros(()))

    def attention(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{name}.{n}", x) for n in ("query", "key", "value"))
        self.note("qkv", torch.cat([q, k, v], -1))
        if self.scheme == "bibert":
            return bi_attention(q, k, v, mask, self.heads, self.sign, self.choose_zeros)
        scales = {n: self.scalar(f"{name}.clip_{n}") for n in ("query", "key", "value", "attn")}
        if self.scheme == "bit":
            return bit_attention(q, k, v, mask, self.heads, self.sign, scales)
        parts = zip(("query", "key", "value"), (q, k, v), strict=True)
        q, k, v = (split_heads(quantise(t, scales[n], -128, 127), self.heads) for n, t in parts)
        probs = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
        low, high = (-128, 127) if self.symmetric else (0, 255)
        return merge_heads(quantise(probs, scales["attn"], low, high) @ v)

    def __call__(
        self, ids: Tensor, keep: Tensor, types: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states ``[B, S, N]`` (also of padding), pooled and logits."""
        s = self.state
        x = self.table()[ids] + s["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(
            "embeddings.LayerNorm", x + s["embeddings.token_type_embeddings.weight"][types]
        )
        mask = (1.0 - keep.to(x.dtype))[:, None, None, :] * -10000.0
        for index in range(SIZES["layers"]):
            name = f"encoder.layer.{index}"
            context = self.note("context", self.attention(f"{name}.attention.self", x, mask))
            y = self.linear(f"{name}.attention.output.dense", context)
            x = self.note("middle", self.norm(f"{name}.attention.output.LayerNorm", y + x))
            inner = self.linear(f"{name}.intermediate.dense", x)
            relu = self.scheme == "bit" or (self.scheme == "binarybert" and not self.symmetric)
            inner = F.relu(inner) if relu else gelu(inner)
            self.note("inner", inner)
            y = self.linear(f"{name}.output.dense", inner, relu)
            x = self.note("rows", self.norm(f"{name}.output.LayerNorm", y + x))
        pooled = torch.tanh(self.linear("pooler.dense", x[:, 0]))
        logits = None
        if "classifier.weight" in s:
            logits = F.linear(pooled, s["classifier.weight"], s["classifier.bias"])
        return x, pooled, logits


class _Maker:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Tensor] = {}

    def normal(self, name: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator) * std + mean

    def norm(self, name: str, old: bool) -> None:
        size = SIZES["hidden"]
        self.normal(f"{name}.{'gamma' if old else 'weight'}", size, mean=1.0)
        self.normal(f"{name}.{'beta' if old else 'bias'}", size)


def checkpoint(scheme: str, *, seed: int = 0, prefix: str = "bert.", old: bool = False,
               split: bool = False, labels: int = 3) -> dict[str, Tensor]:  # fmt: skip
    """A random state dict with the entries that the published code of ``scheme`` writes.

    ``old`` names LayerNorm's parameters gamma and beta; ``split`` gives BinaryBERT's two halves.
    """
    make, n = _Maker(seed), SIZES["hidden"]
    square = ("attention.self.query", "attention.self.key", "attention.self.value")
    shapes = dict.fromkeys((*square, "attention.output.dense"), (n, n))
    shapes |= {"intermediate.dense": (SIZES["inner"], n), "output.dense": (n, SIZES["inner"])}

    def linear(name: str, rows: int, columns: int) -> None:
        for part in (f"{name}_1", f"{name}_2") if split else (name,):
            make.normal(f"{part}.weight", rows, columns)
            make.normal(f"{part}.bias", rows)
            if scheme == "bibert":
                make.state[f"{part}.scale"] = torch.zeros(())
                for clip in ("weight", "act"):
                    make.state[f"{part}.{clip}_clip_val"] = torch.tensor([-2.5, 2.5])
            if scheme == "bit":
                make.normal(f"{part}.move.bias", columns, std=0.1)
                make.state[f"{part}.input_clip_val"] = torch.tensor(0.4) + len(make.state) % 7 / 20
            if scheme == "binarybert":
                make.state[f"{part}.input_clip_val"] = torch.tensor(0.02)

    words = "embeddings.word_embeddings"
    for part in (f"{words}_1", f"{words}_2") if split else (words,):
        make.normal(f"{part}.weight", SIZES["vocab"], n)
        make.state[f"{part}.weight"][0] = 0.0  # the padding row, whose scale is 0
    make.normal("embeddings.position_embeddings.weight", SIZES["positions"], n)
    make.normal("embeddings.token_type_embeddings.weight", 2, n)
    make.norm("embeddings.LayerNorm", old)
    for index in range(SIZES["layers"]):
        layer = f"encoder.layer.{index}"
        for name, shape in shapes.items():
            linear(f"{layer}.{name}", *shape)
        for name in ("attention.output", "output"):
            make.norm(f"{layer}.{name}.LayerNorm", old)
            if scheme == "bibert":
                make.state[f"{layer}.{name}.gate"] = torch.ones(())
        attention = f"{layer}.attention.self"
        for which, value in (("query", 0.9), ("key", 0.8), ("value", 0.7), ("attn", 0.15)):
            clip = {"bibert": torch.tensor([-2.5, 2.5]), "bit": torch.tensor(value)}
            # A step of its own for probabilities: contexts halfway between two codes are rare then.
            step = torch.tensor(0.0193 if which == "attn" else 0.02)
            make.state[f"{attention}.clip_{which}"] = clip.get(scheme, step)
        if scheme == "bit":
            for which in "qkv":
                make.normal(f"{attention}.move_{which}.bias", n)
    linear("pooler.dense", n, n)
    state = {f"{prefix}{name}": value for name, value in make.state.items()}
    if labels:
        head = prefix.removesuffix("bert.")
        generator = make.generator
        state[f"{head}classifier.weight"] = torch.randn(labels, n, generator=generator)
        state[f"{head}classifier.bias"] = torch.randn(labels, generator=generator)
    return state


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, a right-padded mask and token types."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 4, 1, 9])
    ids = torch.randint(SIZES["vocab"], (4, 11), generator=generator)
    types = torch.randint(2, (4, 11), generator=generator)
    return ids, torch.arange(11) < lengths[:, None], types
