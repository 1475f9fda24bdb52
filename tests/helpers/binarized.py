"""What the tests of one-bit BERTs share: numbers, a formula, a small model and padded batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from filbert.compress.binarize import BinarizedBert


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected_weight(w: np.ndarray, scheme: str, granularity: str) -> np.ndarray:
    axis = 1 if granularity == "row" else None
    alpha = np.abs(w).mean(axis=axis, keepdims=True)
    mean = {
        "bibert": w.mean(axis=1, keepdims=True),
        "bit": w.mean(),
        "binarybert": np.zeros(()),
    }[scheme]
    return alpha * np.sign(w - mean)


def dense_bert(seed: int = 0, **config: int):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 128, "vocab_size": 97, "max_position_embeddings": 32, **config,
    }  # fmt: skip
    model = BertModel(BertConfig(**sizes)).eval()
    for parameter in model.parameters():  # the usual 0.02 makes all tokens nearly alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(seed: int = 0, width: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 97, (6, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 3, 1, 9, 12)):
        mask[row, length:] = 0
    return ids, mask


def prepared(scheme: str, **options) -> BinarizedBert:
    """Calibrated, in evaluation mode, and away from symmetric places such as shifts of zero."""
    student = BinarizedBert.from_dense(dense_bert(), scheme, **options)
    student.calibrate(*batch())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("move"):
                parameter.copy_(values(*parameter.shape, seed=4) * 0.1)
    return student.eval()
