"""The settings of :func:`filbert.convert`, as a frozen dataclass that round-trips through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["PackedEncoderConfig"]

#: raised when a field changes its meaning, so that an old file is refused and not misread
VERSION = 1


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
    """

    fold_bias: bool = True
    check: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ``version`` of their meaning, ready for ``json.dump``."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PackedEncoderConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another version, unknown or missing fields, or a value that is no bool.
        """
        values = dict(data)
        version = values.pop("version", None)
        names = {field.name for field in fields(cls)}
        problems = []
        if version != VERSION:
            problems.append(f"version is {version!r}, need {VERSION}")
        if unknown := sorted(set(values) - names):
            problems.append(f"unknown fields {unknown}, known are {sorted(names)}")
        if missing := sorted(names - set(values)):
            problems.append(f"missing fields {missing}")
        problems += [
            f"{name} is {value!r}, need True or False"
            for name, value in values.items()
            if name in names and not isinstance(value, bool)
        ]
        if problems:
            raise ValueError(
                "not a PackedEncoderConfig: " + "; ".join(problems) + "; try PackedEncoderConfig()"
            )
        return cls(**values)
