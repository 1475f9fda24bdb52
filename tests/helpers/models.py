"""Random Hugging Face models small enough to build in every test."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from filbert.conversion.swap import SwappedEncoder
from tolerances import assert_exact

VOCABULARY = 97
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 80,
    "max_position_embeddings": 40,
}

#: family -> (prefix of its classes, prefix of its config's class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "Bert", _BERT),
    "roberta": ("Roberta", "Roberta", _BERT),
    "xlm-roberta": ("XLMRoberta", "XLMRoberta", _BERT),
    "camembert": ("Camembert", "Camembert", _BERT),
    "electra": ("Electra", "Electra", {**_BERT, "embedding_size": 24}),
    "distilbert": ("DistilBert", "DistilBert", _DISTILBERT),
}
HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"]

#: what the padding of a batch looks like: name -> [B, S] with 1 where a token is
MASKS = {
    "none": torch.ones(3, 9, dtype=torch.long),
    "right": torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8]),
    "left": torch.tensor([[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]]),
    "scattered": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1] * 4 + [0], [1] * 9]),
    "empty": torch.tensor([[1] * 9, [0] * 9, [1] * 5 + [0] * 4]),
}


#: every attention implementation each family has in the transformers at hand
ATTENTIONS = [
    (family, attention)
    for family, (prefix, _, _) in FAMILIES.items()
    for attention in ("eager", "sdpa")
    if attention == "eager" or getattr(transformers, f"{prefix}Model")._supports_sdpa
]


def build(
    family: str,
    head: str = "",
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    std: float = 0.2,
    **settings: Any,
) -> Any:
    """A random model in eval mode. ``head`` is a task such as ``"MaskedLM"``, or nothing;
    ``attention`` is transformers' choice if not given.

    Weights are larger than at a usual start (``std`` 0.2 and not 0.02), so that attention is far
    from uniform and a wrong one is seen.
    """
    prefix, config_prefix, base = FAMILIES[family]
    config = getattr(transformers, f"{config_prefix}Config")(**{**base, **settings})
    config._attn_implementation = attention
    kind = getattr(transformers, f"{prefix}For{head}" if head else f"{prefix}Model")
    torch.manual_seed(5)
    model = kind(config).eval()
    assert attention in (None, model.config._attn_implementation)
    return randomise(model, std).to(dtype)


def randomise(model: nn.Module, std: float = 0.2) -> Any:
    """Normal weights and biases; LayerNorms near 1."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu") * std
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm else noise)
    return model


def exactly(model: nn.Module) -> Any:
    """A float64 copy of the model."""
    return copy.deepcopy(model).double()


def tokens(mask: Tensor) -> Tensor:
    """Random token ids, one for each place of ``mask``; none is a padding id, so that positions do
    not depend on the mask in any family."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(5, VOCABULARY, mask.shape, generator=generator, device="cpu")


def swapped(model) -> SwappedEncoder:
    (encoder,) = {m for m in model.modules() if isinstance(m, SwappedEncoder)}
    return encoder


def run(model, mask=MASKS["right"], **kwargs):
    with torch.inference_mode():
        return model(tokens(mask), attention_mask=mask, **kwargs)[0]


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert_exact(state[key], value)
