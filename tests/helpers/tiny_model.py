"""A model folder small enough to save and load in every test, with a real WordPiece tokenizer."""

from __future__ import annotations

import json
import os
import string
import sys
from pathlib import Path

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "red", "blue", "tree", "nan"]


def save_tiny_bert(folder: Path, **config: int) -> Path:
    """Saves a random BERT (2 layers, hidden 64, 2 heads, 64 positions) and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocab = [*specials, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "vocab_size": len(vocab),
    }
    torch.manual_seed(7)
    model = BertModel(BertConfig(**{**sizes, **config}))
    for parameter in model.parameters():  # the usual 0.02 makes every text nearly the same vector
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 48}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def sentence(number: int) -> str:
    """A text that depends on ``number`` alone; lengths go from 1 to 23 words."""
    count = 1 + number * 7 % 23
    return " ".join(WORDS[(number * 3 + i * i) % (len(WORDS) - 1)] for i in range(count))


def python_command(*words: str) -> list[str]:
    return [sys.executable, *words]


def python_environment() -> dict[str, str]:
    """The environment for a child process that must import the filbert this process imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
