"""A whole BERT with binarized layers: made from a dense one, trained, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .modules import BinarizedEmbedding, BinarizedEncoder, BinarizedLinear, QuantizerOptions
from .quantizers import SCHEMES, Scaled, one_of

__all__ = ["BinarizedBert", "BinarizedBertConfig", "BinarizedBertOutput"]

#: raised when a field changes its meaning, so that an old file is refused and not misread
VERSION = 1
_WEIGHTS = "pytorch_model.bin"
#: config fields that a dense model's config has under the same name
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BinarizedBertConfig:
    """Sizes and choices of a :class:`BinarizedBert`; what BERT's config has is named as there.

    Attributes:
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
        hidden_act: ``"gelu"`` or ``"relu"``. BiT is made for ``"relu"``.
        num_labels: of the classifier; 0 for none.
        pooler: whether there is a pooler; a classifier needs one.
        ties, score_ties, bits, mode, granularity: see
            :class:`~filbert.compress.binarize.QuantizerOptions`.
    """

    scheme: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    num_labels: int = 0
    pooler: bool = True
    ties: str = "zero"
    score_ties: str = "below"
    bits: int = 1
    mode: str = "static"
    granularity: str | None = None

    @property
    def options(self) -> QuantizerOptions:
        """The quantizers' part."""
        return QuantizerOptions(*(getattr(self, name) for name in QuantizerOptions._fields))

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ``version`` of their meaning, ready for ``json.dump``."""
        return {"version": VERSION, "model_type": "filbert-binarized-bert", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BinarizedBertConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another version or kind of config, unknown or missing fields.
        """
        values = dict(data)
        kind = (values.pop("model_type", None), values.pop("version", None))
        names = {field.name for field in fields(cls)}
        if kind != ("filbert-binarized-bert", VERSION) or set(values) != names:
            odd = sorted(set(values) ^ names)
            raise ValueError(
                f"not a BinarizedBertConfig: got {kind[0]!r} of version {kind[1]!r} with odd or "
                f"missing fields {odd}, need 'filbert-binarized-bert' of version {VERSION}; try "
                "the config.json that BinarizedBert.save wrote, or BinarizedBert.from_dense"
            )
        return cls(**values)


class BinarizedBertOutput(NamedTuple):
    """What :class:`BinarizedBert` returns; B sequences of length S, L layers, H heads of d values.

    Attributes:
        last_hidden_state: ``[B, S, hidden]``, zero at padding.
        pooler_output: ``[B, hidden]``, or None without a pooler.
        logits: ``[B, labels]``, or None without a classifier.
        hidden_states: the embeddings and each layer's output, L + 1 times ``[B, S, hidden]``, with
            no promise about padding.
        queries, keys, values: L times ``[B, H, S, d]``, before they are quantized.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class _Embeddings(nn.Module):
    def __init__(self, config: BinarizedBertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = BinarizedEmbedding(
            config.vocab_size, hidden, config.pad_token_id,
            scheme=config.scheme, options=config.options,
        )  # fmt: skip
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings(types)))


class BinarizedBert(nn.Module):
    """BERT with one-bit weights and few-bit activations, for training and as a reference.

    The word table, all projections and the pooler's are binarized; positions, token types,
    LayerNorms, residuals, biases and the classifier stay float. The state dict's entries are named
    as in the published checkpoints of each scheme, which load with ``load_state_dict``; entries
    that their own code never reads are dropped on the way.

    Args:
        config: sizes and choices.

    Raises:
        ValueError: choices that contradict each other.
    """

    def __init__(self, config: BinarizedBertConfig) -> None:
        super().__init__()
        one_of("scheme", config.scheme, SCHEMES)
        if config.num_labels and not config.pooler:
            raise ValueError(
                f"num_labels: got {config.num_labels} without a pooler, need one; try pooler=True"
            )
        self.config = config
        encoder = BinarizedEncoder(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
            config.intermediate_size, config.options, activation=config.hidden_act,
            eps=config.layer_norm_eps, dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
        )  # fmt: skip
        self.bert = nn.ModuleDict({"embeddings": _Embeddings(config), "encoder": encoder})
        if config.pooler:
            dense = BinarizedLinear(
                config.hidden_size, config.hidden_size, scheme=config.scheme, options=config.options
            )
            self.bert["pooler"] = nn.ModuleDict({"dense": dense})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else None
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BinarizedBertOutput:
        """Runs the model; in training mode the first call also calibrates learned scales.

        Args:
            input_ids: ``[B, S]`` integers.
            attention_mask: ``[B, S]``, nonzero keeps the token; all are kept if not given. What is
                at padding reaches no other token's result and no calibrated scale.
            token_type_ids: ``[B, S]`` integers, zeros if not given.

        Raises:
            ValueError: shapes that do not fit, or more positions than the model has.
            RuntimeError: scales that are not calibrated, in evaluation mode.
        """
        limit = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > limit:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S] with S at most "
                f"{limit}; try truncating"
            )
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(given.shape)}, need {tuple(input_ids.shape)} like "
                    "input_ids; try the 2-D form"
                )
        keep = None if attention_mask is None else attention_mask != 0
        states, qkvs = self.bert["encoder"](
            self.bert["embeddings"](input_ids, token_type_ids), keep
        )
        last, pooled, logits = states[-1], None, None
        if self.config.pooler:
            first = None if keep is None else keep[:, 0]
            pooled = torch.tanh(self.bert.get_submodule("pooler.dense")(last[:, 0], first))
        if self.classifier is not None:
            logits = self.classifier(self.dropout(pooled))
        if keep is not None:
            last = last.masked_fill(~keep[..., None], 0)
        q, k, v = zip(*qkvs, strict=True)
        return BinarizedBertOutput(last, pooled, logits, states, q, k, v)

    @property
    def calibrated(self) -> bool:
        """Whether every learned scale has a value."""
        return all(m.calibrated for m in self.modules() if isinstance(m, Scaled))

    @torch.no_grad()
    def calibrate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> None:
        """Sets the learned scales that have no value yet, from one batch and without dropout.

        Raises:
            ValueError: as :meth:`forward`, or a batch whose values are not finite.
        """
        modes = {module: module.training for module in self.modules()}
        for module in modes:
            module.training = isinstance(module, Scaled)
        try:
            self(input_ids, attention_mask, token_type_ids)
        finally:
            for module, mode in modes.items():
                module.training = mode

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        scheme: str = "bibert",
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        layers: Sequence[int] | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> BinarizedBert:
        """A student whose latent weights are a dense model's.

        Args:
            dense: a Hugging Face BertModel, with a pooler or not, or BertForSequenceClassification;
                or its config, where ``state_dict`` has the weights.
            scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
            state_dict: the dense model's, its names with or without ``bert.``.
            layers: indices of the dense layers to start from, all if not given.
            dropout: both dropout probabilities, the dense model's if not given.
            options: further fields of :class:`BinarizedBertConfig`, instead of the dense model's or
                the scheme's (``hidden_act`` is ``"relu"`` with ``"bit"``, ``bits`` 8 with
                ``"binarybert"``).

        Raises:
            ValueError: another kind of model, or weights that are missing or of the wrong shape.
        """
        one_of("scheme", scheme, SCHEMES)
        source = getattr(dense, "config", dense)
        weights = dict(dense.state_dict() if state_dict is None else state_dict)
        kind = getattr(source, "model_type", None)
        positions = getattr(source, "position_embedding_type", None) or "absolute"
        if kind != "bert" or positions != "absolute" or getattr(source, "is_decoder", False):
            raise ValueError(
                f"dense: got model_type {kind!r} with {positions} positions, need a BERT encoder "
                "with absolute positions; try transformers.BertModel"
            )
        cls._check_head(dense, weights)
        weights = {
            name if name.startswith(("bert.", "classifier.")) else f"bert.{name}": value.detach()
            for name, value in weights.items()
        }
        total = source.num_hidden_layers
        kept = list(range(total) if layers is None else layers)
        if not kept or not all(0 <= index < total for index in kept):
            raise ValueError(f"layers: got {kept}, need indices from 0 to {total - 1}; try [0]")
        values: dict[str, Any] = {name: getattr(source, name) for name in _SHARED}
        values.update(scheme=scheme, num_hidden_layers=len(kept))
        values["pooler"] = "bert.pooler.dense.weight" in weights
        if "classifier.weight" in weights:
            values["num_labels"] = weights["classifier.weight"].shape[0]
        if dropout is not None:
            values.update(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        if scheme == "bit":
            values["hidden_act"] = "relu"
        if scheme == "binarybert":
            values["bits"] = 8
        values.update(options)
        student = cls(BinarizedBertConfig(**values))
        student._take(weights, kept)
        return student

    @staticmethod
    def _check_head(dense: Any, weights: Mapping[str, Tensor]) -> None:
        """Refuses heads that a student does not have."""
        name = type(dense).__name__
        known = ("embeddings.", "encoder.", "pooler.", "classifier.")
        odd = [key for key in weights if not key.removeprefix("bert.").startswith(known)]
        other = name.startswith("BertFor") and name != "BertForSequenceClassification"
        if odd or other:
            raise ValueError(
                f"dense: got {name} with {', '.join(odd[:3]) or 'its head'}, need a BertModel or "
                "BertForSequenceClassification, whose heads a student has; try its encoder, "
                "from_dense(model.bert)"
            )

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Tensor], kept: Sequence[int]) -> None:
        """Copies dense weights into the entries of the same names, layer ``i`` from ``kept[i]``."""
        missing = []
        for name, parameter in self.named_parameters():
            if ".quantizer." in name or "_quantizer." in name:
                continue
            head, found, tail = name.partition("encoder.layer.")
            if found:
                index, _, tail = tail.partition(".")
                tail = f"{kept[int(index)]}.{tail}"
            value = weights.get(head + found + tail)
            if value is None or value.shape != parameter.shape:
                got = "nothing" if value is None else tuple(value.shape)
                missing.append(f"{name} (got {got}, need {tuple(parameter.shape)})")
            else:
                parameter.copy_(value)
        if missing:
            raise ValueError(
                f"dense: {len(missing)} weights do not fit, first {'; '.join(missing[:3])}; need "
                "all of them; try the state_dict and config of one transformers.BertModel"
            )

    def save(self, folder: str | Path) -> None:
        """Writes ``config.json`` and the latent weights, ``pytorch_model.bin``, into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config.to_dict(), indent=1)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        torch.save(self.state_dict(), folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> BinarizedBert:
        """What :meth:`save` wrote, in evaluation mode on the CPU.

        Raises:
            OSError: files that are not there.
            ValueError: a ``config.json`` of something else.
            RuntimeError: weights that do not fit it.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(BinarizedBertConfig.from_dict(config))
        weights = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        return model.eval()
