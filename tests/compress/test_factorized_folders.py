"""Models of low rank on disk: they come back to the bit, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import filbert
from models import MASKS, build, swapped
from models import run as run_padded
from tolerances import assert_exact


def run(model) -> torch.Tensor:
    """The hidden states of kept tokens."""
    return run_padded(model)[MASKS["right"].bool()]


SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_comes_back_to_the_bit(tmp_path, family, dtype):
    sizes = SIZES if family != "distilbert" else {}
    model = filbert.factorize(build(family, dtype=dtype, **sizes), ranks=9)
    filbert.save_factorized(model, tmp_path / "made")
    loaded = filbert.load_factorized(tmp_path / "made")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_exact(run(loaded), run(model))
    assert str(filbert.factorization_report(loaded)) == str(filbert.factorization_report(model))
    again = tmp_path / "again"
    filbert.save_factorized(loaded, again)
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (tmp_path / "made" / "config.json").read_text()
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_factors_of_few_bits(tmp_path, bits):
    model = filbert.factorize(build("bert", **SIZES), ranks=16, factor_bits=bits)
    filbert.save_factorized(model, tmp_path)
    loaded = filbert.load_factorized(tmp_path)
    assert_exact(run(loaded), run(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {entry["bits"] for entry in config["low_rank"]["weights"].values()} == {bits}


def test_some_layers_and_smaller_files(tmp_path):
    model = build("bert", **SIZES)
    model.save_pretrained(tmp_path / "dense")
    ranks = {"re:layer.0.attention": None, "re:attention": 16, "re:.*": 8}
    filbert.save_factorized(filbert.factorize(model, ranks=ranks), tmp_path / "low")
    loaded = filbert.load_factorized(tmp_path / "low")
    assert_exact(run(loaded), run(model))
    assert "dense" in {
        row.runs.partition(":")[0] for row in filbert.factorization_report(loaded).rows
    }
    dense, low = (
        sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        for name in ("dense", "low")
    )
    assert low < 0.7 * dense
    # A loader that knows no factors finds no weights, and says so.
    import transformers

    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path / "low")


def test_damage_is_named(tmp_path):
    model = filbert.factorize(build("bert", **SIZES), ranks=9)
    filbert.save_factorized(model, tmp_path)
    path = tmp_path / "factors.safetensors"
    whole, config = path.read_bytes(), (tmp_path / "config.json").read_text()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is cut off"):
        filbert.load_factorized(tmp_path)
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="is damaged"):
        filbert.load_factorized(tmp_path)
    path.write_bytes(whole)
    tensors = load_file(str(path))
    name = next(name for name in tensors if name.endswith(".a"))
    save_file({n: t for n, t in tensors.items() if n != name}, str(path))
    with pytest.raises(ValueError, match=f"{name} is missing"):
        filbert.load_factorized(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text(config.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="got low_rank of format 2"):
        filbert.load_factorized(tmp_path)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without weights of low rank"):
        filbert.save_factorized(build("bert"), tmp_path)
    with pytest.raises(ValueError, match="has weights of few bits"):
        filbert.save_factorized(filbert.quantize(build("bert"), 4), tmp_path)
    with pytest.raises(ValueError, match="need a transformers model"):
        filbert.save_factorized(torch.nn.Linear(2, 2), tmp_path)
    made = filbert.factorize(build("bert", **SIZES), ranks=9)
    assert swapped(made).compressed is not None
    with pytest.raises(FileNotFoundError):
        filbert.load_factorized(tmp_path / "nowhere")
