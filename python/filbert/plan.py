"""The settings of :func:`filbert.convert`, as a frozen dataclass that round-trips through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["PackedEncoderConfig"]

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
