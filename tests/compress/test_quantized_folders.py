"""Models of few bits on disk: saved, loaded, damaged, and from other formats."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from torch import nn

import filbert
from filbert.compress.quantize import quantization_report, register
from filbert.nn import EmbeddingGrouped
from models import build, randomise
from tiny_model import save_tiny_bert, sentence
from tolerances import assert_exact

IDS = torch.arange(3, 3 + 24).view(2, 12)
MASK = torch.ones(2, 12, dtype=torch.int64)
MASK[1, 7:] = 0


def answer(model):
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK)[0]


def tiny(**config):
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 64, "vocab_size": 60,
    }  # fmt: skip
    return randomise(BertModel(BertConfig(**{**sizes, **config})).eval())


@pytest.fixture(scope="module")
def quantized():
    """Several numbers of bits, a layer's output projection in floats."""
    chosen = {"re:0.attention.output": None, "re:attention": 3, "re:layer.0": 4, "re:.*": 8}
    return filbert.quantize(tiny(), chosen)


@pytest.fixture
def folder(quantized, tmp_path):
    filbert.save_quantized(quantized, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_the_same_bits_and_the_same_report(quantized, folder):
    loaded = filbert.load_quantized(folder)
    assert type(loaded) is type(quantized)
    assert not loaded.training
    assert_exact(answer(loaded), answer(quantized))
    assert str(quantization_report(loaded)) == str(quantization_report(quantized))
    assert str(filbert.report(loaded)) == str(filbert.report(quantized))
    state, expected = loaded.state_dict(), quantized.state_dict()
    assert state.keys() == expected.keys()
    for name, t in state.items():
        assert_exact(t, expected[name])
    # What it is from now on is what quantize makes.
    assert not hasattr(loaded.config, "quantization_config") or (
        loaded.config.quantization_config is None
    )
    reverted = filbert.revert(loaded)
    assert not any(isinstance(m, EmbeddingGrouped) for m in reverted.modules())


def test_a_folder_is_written_again_byte_by_byte(folder, tmp_path):
    filbert.save_quantized(filbert.load_quantized(folder), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_is_as_small_as_its_codes(tmp_path):
    model = tiny(vocab_size=2000, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    floats = sum(4 * p.numel() for p in model.parameters())
    filbert.save_quantized(filbert.quantize(model, 4, embed_bits=4), tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    held = quantization_report(model).nbytes
    rest = sum(4 * p.numel() for n, p in model.named_parameters() if "pooler" in n or p.dim() == 1)
    assert held + rest <= size <= held + rest + 32768 < floats / 5


def test_dtype_and_from_pretrained(quantized, folder):
    from transformers import AutoModel, BertForSequenceClassification

    register()
    assert_exact(answer(AutoModel.from_pretrained(folder).eval()), answer(quantized))
    half = filbert.load_quantized(folder, dtype=torch.bfloat16)
    expected = answer(copy.deepcopy(quantized).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert_exact(answer(half), expected)
    # A model with a head around the one that was saved, whose names get a prefix.
    classifier = BertForSequenceClassification.from_pretrained(folder).eval()
    assert_exact(answer(classifier.bert), answer(quantized))


def test_a_head_that_shares_the_table(tmp_path):
    from transformers import AutoModel, BertForMaskedLM

    model = build("bert", "MaskedLM")
    filbert.save_quantized(filbert.quantize(model, 4), tmp_path)
    loaded = filbert.load_quantized(tmp_path)
    assert type(loaded) is BertForMaskedLM
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert_exact(answer(loaded), answer(model))
    register()
    inner = AutoModel.from_pretrained(tmp_path).eval()  # names lose their prefix
    assert_exact(answer(inner), answer(model.bert))


def test_a_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(save_tiny_bert(tmp_path / "bert")))
    texts = [sentence(i) for i in range(6)]
    filbert.quantize(model.eval(), 4, calibration=texts)
    filbert.save_quantized(model, tmp_path / "saved")
    assert not [p for p in (tmp_path / "saved").rglob("*") if p.suffix in (".bin", ".pt")]
    loaded = filbert.load_quantized(tmp_path / "saved")
    assert_exact(
        loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True)
    )


def names_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {n: [8 + length + at for at in e["data_offsets"]] for n, e in header.items()}


def test_damage_is_found_and_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for name, (begin, end) in names_of(folder).items():
        if begin == end:
            continue
        damaged = bytearray(whole)
        damaged[(begin + end) // 2] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            filbert.load_quantized(folder)
    last = max(names_of(folder).items(), key=lambda pair: pair[1])
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{last[0]} is cut off"):
        filbert.load_quantized(folder)
    for length in (4, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut off|header"):
            filbert.load_quantized(folder)
    path.write_bytes(whole)
    filbert.load_quantized(folder)


def test_damage_is_found_without_load_quantized(folder):
    from transformers import AutoModel

    register()
    path = folder / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    name = "encoder.layer.1.attention.self.key.packed"
    damaged[names_of(folder)[name][0]] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        AutoModel.from_pretrained(folder)


def change(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


QUERY = "encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda q: q.update(format=2),
            "got method and format .'filbert', 2., need",
        ),
        (lambda q: q.pop("weights"), "entries that make no weight"),
        (lambda q: q["weights"][QUERY].update(bits=5), f"got 5 bits in 1 groups for {QUERY}"),
        (lambda q: q["weights"][QUERY].update(colour=1), "entries that make no weight"),
        (lambda q: q["crc32"].update({"x.packed": 1}), "x.packed is missing"),
        (lambda q: q["crc32"].pop(f"{QUERY}.packed"), f"{QUERY}.packed is unknown"),
        (lambda q: q.update(quant_method="other"), "need a folder of filbert.save_quantized"),
    ],
)
def test_another_config_is_refused(folder, edit, said):
    change(folder, edit)
    with pytest.raises(ValueError, match=said):
        filbert.load_quantized(folder)


def test_bits_that_are_not_the_files(folder):
    change(folder, lambda q: q["weights"][QUERY].update(bits=4))
    with pytest.raises((ValueError, RuntimeError), match=f"{QUERY}.packed|size mismatch|mismatch"):
        filbert.load_quantized(folder)


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"without weights of few bits; try filbert.quantize"):
        filbert.save_quantized(tiny(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="need a transformers model"):
        filbert.save_quantized(nn.Linear(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match="No such folder"):
        filbert.load_quantized(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"no config.json with a quantization_config of filbert"):
        filbert.load_quantized(tmp_path / "dense")


# --- other formats ---


def stream(codes, bits):
    """Rows of codes as 32-bit words, one bit after the other."""
    rows = codes.shape[0]
    every = (codes[..., None] >> torch.arange(bits) & 1).reshape(rows, -1)
    every = nn.functional.pad(every, (0, -every.shape[1] % 32)).view(rows, -1, 32).long()
    words = (every << torch.arange(32)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def codes_of(weight, bits, group, asymmetric):
    """Codes, steps and zeros by rounding to nearest, as any other tool would choose them."""
    parts = weight.unflatten(1, (-1, group))
    span = (1 << bits) - 1
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if asymmetric:
        steps = ((high - low) / span).half().float()
        zeros = (-low / steps).round().clamp(1, span)  # 0 is what the first version cannot hold
    else:
        steps = (2 * torch.maximum(high, -low) / span).half().float()
        zeros = torch.full_like(steps, 1 << (bits - 1))
    codes = ((parts / steps[..., None]).round() + zeros[..., None]).clamp(0, span)
    numbers = (codes - zeros[..., None]) * steps[..., None]
    return codes.flatten(1).int(), steps, zeros.int(), numbers.flatten(1)


def linears_of(model):
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "encoder" in name
    }


def write(folder, model, tensors, about):
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))


def as_gptq(model, folder, bits, group, asymmetric, version="gptq", order=None):
    """Writes the checkpoint, and gives ``model`` the numbers that it stands for."""
    tensors = dict(model.state_dict())
    for name, linear in linears_of(model).items():
        codes, steps, zeros, numbers = codes_of(linear.weight.detach(), bits, group, asymmetric)
        linear.weight.data = numbers
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = stream(codes, bits).T
        stored = zeros if version == "gptq_v2" else zeros - 1
        tensors[f"{name}.qzeros"] = stream(stored.T, bits)
        tensors[f"{name}.scales"] = steps.T.half()
        index = torch.arange(linear.in_features, dtype=torch.int32) // group
        tensors[f"{name}.g_idx"] = index if order is None else index[order(linear.in_features)]
    about = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "checkpoint_format": version,
    }
    write(folder, model, tensors, about)


def as_pack_quantized(model, folder, bits, group, asymmetric, apart=False):
    tensors = dict(model.state_dict())
    for name, linear in linears_of(model).items():
        size = linear.in_features if group is None else group
        codes, steps, zeros, numbers = codes_of(linear.weight.detach(), bits, size, asymmetric)
        linear.weight.data = numbers
        del tensors[f"{name}.weight"]
        if apart:  # no code lies in two words
            own = 32 // bits
            padded = nn.functional.pad(codes, (0, -codes.shape[1] % own)).unflatten(1, (-1, own))
            words = (padded.long() << bits * torch.arange(own)).sum(-1)
            tensors[f"{name}.weight_packed"] = (words - ((words >> 31) << 32)).to(torch.int32)
        else:
            tensors[f"{name}.weight_packed"] = stream(codes, bits)
        tensors[f"{name}.weight_scale"] = steps
        tensors[f"{name}.weight_shape"] = torch.tensor(numbers.shape)
        if asymmetric:
            tensors[f"{name}.weight_zero_point"] = stream(zeros.T, bits).T
    weights = {"num_bits": bits, "type": "int", "symmetric": not asymmetric, "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    write(folder, model, tensors, about)


def imported(tmp_path):
    filbert.import_quantized(tmp_path / "theirs", tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").exists()
    return filbert.load_quantized(tmp_path / "ours")


def assert_numbers_of(loaded, model, least):
    """Each weight of ``loaded`` is within a little of the imported one's numbers."""
    state = loaded.state_dict()
    for name, linear in linears_of(model).items():
        got, need = state[f"{name}.weight"], linear.weight
        assert float((got - need).norm() / need.norm()) < least, name
    for row in quantization_report(loaded):
        assert row.error < least


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("version", "asymmetric"), [("gptq", False), ("gptq", True), ("gptq_v2", True)]
)
def test_gptq_checkpoints(bits, version, asymmetric, tmp_path):
    model = tiny(hidden_size=128, intermediate_size=256)
    as_gptq(model, tmp_path / "theirs", bits, 32, asymmetric, version)
    loaded = imported(tmp_path)
    assert_numbers_of(loaded, model, 0.004)
    with torch.inference_mode():
        cosine = torch.cosine_similarity(answer(loaded), answer(model), -1)[MASK == 1]
    assert float(cosine.min()) > 0.995
    assert all(row.bits == bits and row.group == 32 for row in quantization_report(loaded))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [None, 64, 256])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_pack_quantized_checkpoints(bits, group, asymmetric, tmp_path):
    model = tiny(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    as_pack_quantized(model, tmp_path / "theirs", bits, group, asymmetric, apart=group == 64)
    loaded = imported(tmp_path)
    # One group of all inputs is exact, but for the last bit of a float32.
    assert_numbers_of(loaded, model, 0.004 if group == 64 else 1e-6)


def test_streams_are_those_of_compressed_tensors():
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from filbert.compress.quantize.imports import unpack_stream

    for bits in (2, 3, 4, 6, 8):
        codes = torch.randint(0, 1 << bits, (5, 75), dtype=torch.int32)
        words = packing.pack_to_int32((codes - (1 << (bits - 1))).to(torch.int8), bits)
        assert_exact(unpack_stream(words, bits, 75), codes)


def test_checkpoints_that_are_refused(tmp_path):
    model = tiny(hidden_size=128, intermediate_size=256)
    as_gptq(copy.deepcopy(model), tmp_path / "ordered", 4, 32, False, order=torch.randperm)
    as_gptq(copy.deepcopy(model), tmp_path / "small", 4, 16, False)
    as_gptq(copy.deepcopy(model), tmp_path / "fine", 4, 32, False)
    name = "encoder.layer.0"

    def refused(folder, said, error=ValueError):
        with pytest.raises(error, match=said):
            filbert.import_quantized(tmp_path / folder, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    refused("ordered", rf"{name}[.\w]*: got inputs in an order of their own")
    refused("small", rf"{name}[.\w]*: got groups of 16 inputs, need 32, 64, 128")
    about = json.loads((tmp_path / "fine" / "config.json").read_text())
    for change, said in (
        ({"quant_method": "awq"}, "got quantization method 'awq'"),
        ({"bits": 5}, name),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'pack-quantized'"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "no tensor is called .*weight_packed",
        ),
    ):
        changed = {**about, "quantization_config": {**about["quantization_config"], **change}}
        (tmp_path / "fine" / "config.json").write_text(json.dumps(changed))
        refused("fine", said)
    path = tmp_path / "fine" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "fine" / "config.json").write_text(json.dumps(about))
    refused("fine", "no whole safetensors file")
    path.unlink()
    refused("fine", "No .safetensors file", FileNotFoundError)
