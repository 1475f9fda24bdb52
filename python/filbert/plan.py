"""The settings and plans of :func:`filbert.convert`: frozen dataclasses that round-trip through
JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["KINDS", "SLOTS", "EncoderPlan", "LayerPlan", "PackedEncoderConfig"]

#: raised when a field comes or changes its meaning, so that a file is never misread
VERSION = 2
#: the fields that came with a version, and what files of an earlier one meant
_CAME = {2: {"masked_rows": "zero"}}
MASKED_ROWS = ("zero", "compute")


@dataclass(frozen=True)
class PackedEncoderConfig:
    """How an encoder is packed.

    Attributes:
        fold_bias: Do the inference algebra on biases. The key bias adds the same number to every
            score of a query and so drops out of the softmax; the value bias passes through the
            softmax unchanged (its weights sum to 1) and becomes part of the output bias,
            ``b_o + W_o b_v``, summed in float64.
        check: Run the original and the packed encoder on a small padded input before the swap is
            kept, and refuse the encoder if they differ. Only turn this off to save its time.
        masked_rows: What the encoder answers at places outside the attention mask. ``"zero"``:
            zeros, and no time is spent on them. ``"compute"``: the hidden states that plain
            transformers computes there, of queries that see the kept keys only, for those who read
            them (ColBERT's and PyLate's query expansion); padding then costs what it costs there.
            A text without any kept token attends to nothing; what transformers makes of such a text
            depends on its attention implementation.
            :func:`filbert.embed` pools over kept tokens and is the same with both.
    """

    fold_bias: bool = True
    check: bool = True
    masked_rows: str = "zero"

    def __post_init__(self) -> None:
        if self.masked_rows not in MASKED_ROWS:
            raise ValueError(f"masked_rows: got {self.masked_rows!r}, need one of {MASKED_ROWS}")

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ``version`` of their meaning, ready for ``json.dump``."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PackedEncoderConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a later version, unknown or missing fields, or a value that does not fit.
        """
        values = dict(data)
        version = values.pop("version", None)
        names = {field.name for field in fields(cls)}
        problems = []
        if version not in range(1, VERSION + 1):
            problems.append(f"version is {version!r}, need {VERSION} or less")
        else:
            for later, came in _CAME.items():
                if version < later:
                    values = {**came, **values}
        if unknown := sorted(set(values) - names):
            problems.append(f"unknown fields {unknown}, known are {sorted(names)}")
        if missing := sorted(names - set(values)):
            problems.append(f"missing fields {missing}")
        problems += [
            f"{name} is {value!r}, need True or False"
            for name, value in values.items()
            if name in names and name != "masked_rows" and not isinstance(value, bool)
        ]
        if values.get("masked_rows", "zero") not in MASKED_ROWS:
            problems.append(f"masked_rows is {values['masked_rows']!r}, need one of {MASKED_ROWS}")
        if problems:
            raise ValueError(
                "not a PackedEncoderConfig: " + "; ".join(problems) + "; try PackedEncoderConfig()"
            )
        return cls(**values)


#: the slots of a layer, see :mod:`filbert.nn.layer`, and the kinds that fill them from a model
SLOTS = ("attention", "out", "feed_forward")
KINDS = ("dense", "grouped", "lowrank", "binary")


@dataclass(frozen=True)
class LayerPlan:
    """Which kind of module fills each slot of a layer: ``"dense"``, ``"grouped"`` (2 to 8 bits,
    Q-BERT; its weights come from :func:`filbert.quantize`), ``"lowrank"`` (FlashSVD; its factors
    come from :func:`filbert.factorize`), or ``"binary"`` (BiBERT).

    Attributes:
        attention: query, key, value and attention.
        out: the output projection; binary where attention is.
        feed_forward: both linear layers and the activation between them.
    """

    attention: str = "dense"
    out: str = "dense"
    feed_forward: str = "dense"

    def __post_init__(self) -> None:
        problems = [
            f"{slot} is {getattr(self, slot)!r}, need one of {KINDS}"
            for slot in SLOTS
            if getattr(self, slot) not in KINDS
        ]
        if self.attention == "binary" and self.out != "binary":
            problems.append(
                f"attention is 'binary' and out is {self.out!r}, need out='binary': the context is "
                "bits"
            )
        if problems:
            raise ValueError("LayerPlan: " + "; ".join(problems))

    @classmethod
    def all(cls, kind: str) -> LayerPlan:
        """Every slot of one ``kind``."""
        return cls(kind, kind, kind)

    def has(self, kind: str) -> bool:
        """Whether any slot is of that kind."""
        return any(getattr(self, slot) == kind for slot in SLOTS)


@dataclass(frozen=True)
class EncoderPlan:
    """Which kind each slot of each layer is, and the settings of the whole.

    Attributes:
        default: of the layers that ``layers`` does not name.
        layers: index -> plan.
        trained: the weights of all binary slots were trained to be binary (their latent floats, as
            :func:`filbert.binarize` reads them). Without it such a plan is refused: the signs of
            ordinary weights compute noise.
        settings: as of a conversion without a plan.
    """

    default: LayerPlan = field(default_factory=LayerPlan)
    layers: Mapping[int, LayerPlan] = field(default_factory=dict)
    trained: bool = False
    settings: PackedEncoderConfig = field(default_factory=PackedEncoderConfig)

    def of(self, index: int) -> LayerPlan:
        """The plan of layer ``index``."""
        return self.layers.get(index, self.default)

    def problems(self, count: int) -> list[str]:
        """Why an encoder of ``count`` layers cannot follow it; empty if it can."""
        found = [
            f"the plan names layer {index}, need 0 to {count - 1}"
            for index in self.layers
            if not 0 <= index < count
        ]
        if not self.trained and any(self.of(index).has("binary") for index in range(count)):
            found.append(
                "the plan has binary slots, and the signs of ordinary weights compute noise; need "
                "weights that were trained to be binary; try EncoderPlan(..., trained=True)"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ``version`` of their meaning, ready for ``json.dump``."""
        return {
            "version": 1,
            "default": asdict(self.default),
            "layers": {str(index): asdict(plan) for index, plan in self.layers.items()},
            "trained": self.trained,
            "settings": self.settings.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another version, unknown or missing fields, or a value that does not fit.
        """
        if data.get("version") != 1:
            raise ValueError(
                f"not an EncoderPlan: version is {data.get('version')!r}, need 1; try EncoderPlan()"
            )
        if not isinstance(data.get("trained", False), bool):
            raise ValueError(
                f"not an EncoderPlan: trained is {data['trained']!r}, need True or False; try "
                "EncoderPlan()"
            )
        try:
            return cls(
                default=LayerPlan(**data["default"]),
                layers={int(index): LayerPlan(**plan) for index, plan in data["layers"].items()},
                trained=data["trained"],
                settings=PackedEncoderConfig.from_dict(data["settings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an EncoderPlan: {error}; try EncoderPlan()") from error
