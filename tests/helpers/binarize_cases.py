"""What the tests of ``filbert.binarize`` share: filbert's own students, and refusals."""

from __future__ import annotations

import pytest
import torch

import filbert
from binary_reference import SIZES
from filbert.compress.binarize import BinarizedBert, BinarizedBertConfig
from filbert.conversion.in_place import ConvertError


def own(scheme, **options):
    """filbert's own eager student, random and calibrated."""
    sizes = {
        "vocab_size": SIZES["vocab"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 80, "max_position_embeddings": 24,
        "num_labels": 3, "hidden_act": "relu" if scheme == "bit" else "gelu",
        "bits": 8 if scheme == "binarybert" else 1,
    }  # fmt: skip
    model = BinarizedBert(BinarizedBertConfig(scheme=scheme, **{**sizes, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("scale"):
                noise = torch.randn(p.shape, generator=generator) * 0.2
                p.copy_(noise + ("LayerNorm.weight" in name))
    model.eval()
    return model


def refused(*args, **kwargs):
    with pytest.raises(ConvertError) as caught:
        filbert.binarize(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)
