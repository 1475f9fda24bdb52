"""Converted models on the CUDA kernels: on a GPU where there is one, and always on the host.

On the host the GEMMs are PyTorch's for the CPU and every kernel of filbert's is the CUDA source.
"""

from __future__ import annotations

import pytest
import torch

from conftest import BACKENDS
from filbert import convert, embed, factorize, report, revert, use_rank
from filbert.plan import PackedEncoderConfig
from models import FAMILIES, MASKS, assert_same_state, bits, build, exactly, swapped, tokens
from tolerances import assert_close_to_native, assert_exact

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize(
        "backend", [b for b in BACKENDS if b in ("hostcuda-0", "cuda")], indirect=True
    ),
]


def kept_rows(model, mask, device):
    with torch.inference_mode():
        output = model(tokens(mask).to(device), attention_mask=mask.to(device))
    return output.last_hidden_state[mask.bool().to(device)]


def made(family, dtype, device, **settings):
    with torch.device("cpu"):
        return build(family, dtype=dtype, **settings).to(device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(gpu, family, dtype, mask):
    model = made(family, dtype, gpu, attention="eager")
    mask = MASKS[mask]
    native, exact = kept_rows(model, mask, gpu), kept_rows(exactly(model), mask, gpu)
    ours = kept_rows(convert(model), mask, gpu)
    assert ours.dtype == dtype
    assert_close_to_native(ours, native, exact)
    if dtype == torch.float16 or gpu.type == "cuda":
        assert swapped(model).compute_dtype == dtype  # never widened, unlike on a CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fold_bias", [True, False], ids=["folded", "not folded"])
def test_heads_that_no_kernel_has(gpu, dtype, fold_bias):
    """Zeros for them lie in the packed weights; the model's own come back bit for bit."""
    model = made("bert", dtype, gpu, hidden_size=78, num_attention_heads=3)
    before, mask = bits(model), MASKS["scattered"]
    native, exact = kept_rows(model, mask, gpu), kept_rows(exactly(model), mask, gpu)
    convert(model, PackedEncoderConfig(fold_bias=fold_bias))
    assert_close_to_native(kept_rows(model, mask, gpu), native, exact)
    assert [layer.attention.head_dim for layer in swapped(model).layers] == [32, 32]
    assert_same_state(bits(model), before)
    assert_same_state(bits(revert(model)), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fold_bias", [True, False], ids=["folded", "not folded"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_settings(gpu, dtype, act, fold_bias):
    model = made("bert", dtype, gpu, hidden_act=act)
    mask = MASKS["scattered"]
    native, exact = kept_rows(model, mask, gpu), kept_rows(exactly(model), mask, gpu)
    convert(model, PackedEncoderConfig(fold_bias=fold_bias))
    assert_close_to_native(kept_rows(model, mask, gpu), native, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_of_bert_base(gpu, dtype):
    """The real geometry, with texts on both sides of what one block holds."""
    settings = {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "num_hidden_layers": 1, "max_position_embeddings": 200,
    }  # fmt: skip
    model = made("bert", dtype, gpu, std=0.04, **settings)
    mask = (torch.arange(150) < torch.tensor([20, 150, 0, 64])[:, None]).long()
    native, exact = kept_rows(model, mask, gpu), kept_rows(exactly(model), mask, gpu)
    assert_close_to_native(kept_rows(convert(model), mask, gpu), native, exact)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("mask", MASKS)
def test_embed(gpu, mask, pooling):
    model = made("bert", torch.float16, gpu)
    mask = MASKS[mask]
    ids = tokens(mask)
    hidden = exactly(model)(ids.to(gpu), attention_mask=mask.to(gpu)).last_hidden_state
    ours = embed(convert(model), ids.to(gpu), mask.to(gpu), pooling)
    for row, length in enumerate(mask.sum(1).tolist()):
        kept = hidden[row][mask[row].bool().to(gpu)]
        if length == 0:
            assert (ours[row] == 0).all()
            continue
        want = kept.mean(0) if pooling == "mean" else kept[0]
        torch.testing.assert_close(ours[row].double(), want, rtol=0.02, atol=0.02)


def test_another_text_cannot_reach_an_answer(gpu):
    model = convert(made("bert", torch.float16, gpu))
    mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    first = tokens(mask)
    second = first.clone()
    second[1] = second[1].flip(0)
    with torch.inference_mode():
        a, b = (
            model(ids.to(gpu), attention_mask=mask.to(gpu)).last_hidden_state
            for ids in (first, second)
        )
    assert_exact(a[0], b[0])
    assert_exact(a[0, 5:], torch.zeros_like(a[0, 5:]))
    assert not torch.equal(a[1], b[1])


def test_report_names_the_kernels(gpu):
    model = convert(made("bert", torch.float16, gpu))
    kernels = {row.name.rpartition(".")[2]: row.kernel for row in report(model)}
    if gpu.type == "cuda":
        assert any(kernel.startswith("attn_varlen cuda sm_") for kernel in kernels.values())
    assert any("F.linear" in kernel for kernel in kernels.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_of_low_rank(gpu, dtype, monkeypatch):
    """Its feed-forward part is one kernel where rows have 16 bits."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    model = factorize(made("bert", dtype, gpu, **sizes), ranks=19)
    mask = MASKS["scattered"]
    part = swapped(model).layers[0].feed_forward
    assert part.kind == "lowrank"
    assert (part.why_not_fused() is None) == (dtype != torch.float32)
    assert "rank 19" in str(report(model))
    ours = kept_rows(model, mask, gpu)
    use_rank(model, 16)
    smaller = kept_rows(model, mask, gpu)
    use_rank(model, None)
    assert not torch.equal(smaller, ours)
    assert_exact(kept_rows(model, mask, gpu), ours)
    monkeypatch.setattr("filbert.nn.lowrank.linear.FEWEST_ROWS", 1)
    in_one = kept_rows(model, mask, gpu)
    plain = revert(model)
    native, exact = kept_rows(plain, mask, gpu), kept_rows(exactly(plain), mask, gpu)
    assert_close_to_native(in_one, native, exact, factor=4.0)
    # Two products in the place of each, so errors of twice as many roundings.
    assert_close_to_native(ours, native, exact, factor=4.0)
