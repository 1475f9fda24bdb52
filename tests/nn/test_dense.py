"""PackedLinear: the product, the weight that comes back, and how the backend is chosen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from filbert import _load
from filbert.nn import PackedLinear
from filbert.nn.dense import backends
from filbert.nn.dense import linear as dense
from filbert.nn.dense.linear import choices, gelu_kind, row_dtype
from tolerances import assert_close_to_native, assert_exact

CPU = torch.device("cpu")
SHAPES = [(1, 8), (24, 16), (25, 17), (96, 48)]


@pytest.fixture(params=backends.BACKENDS, ids=lambda kind: kind.name)
def dense_backend(request, monkeypatch):
    """Each backend in turn, if it can run here; else what is chosen in its place."""
    monkeypatch.setattr(backends, "BACKENDS", (request.param, backends.FLinear))
    return request.param


def exact(x, weight, bias, activation):
    y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return y if activation is None else F.gelu(y, approximate=dense.GELU_FORMS[activation])


def native(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate=dense.GELU_FORMS[activation])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_product(dense_backend, shape, dtype, with_bias, activation):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    linear = PackedLinear([weight], bias, activation=activation)
    runs = dense_backend.why_not(weight, linear.compute_dtype) is None
    assert linear.backend == (dense_backend.name if runs else "linear")
    x = torch.randn(78, shape[1]).to(dtype)
    before = x.clone()
    # Judged together: of a single number the native error can be next to nothing by chance.
    got = [linear(part.to(linear.compute_dtype)) for part in x.split((0, 1, 13, 64))]
    assert got[0].dtype == linear.compute_dtype == row_dtype(dtype, CPU)
    assert_close_to_native(
        torch.cat(got).to(dtype), native(x, weight, bias, activation),
        exact(x, weight, bias, activation),
    )  # fmt: skip
    # One row takes another path, whose mistake the worst of 78 rows would excuse. Its own bound is
    # loose: two roundings of everything that is summed.
    row = x[:1]
    summed = row.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.abs())
    error = (got[1].to(dtype).double() - exact(row, weight, bias, activation)).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * summed).all()
    assert_exact(x, before)


@pytest.mark.parametrize("widened", [False, True])
def test_backend_is_named(widened):
    dtype = torch.bfloat16 if widened else torch.float32
    linear = PackedLinear([torch.randn(16, 8).to(dtype)], compute_dtype=torch.float32)
    if _load.have_ops():
        assert linear.backend == "filbert"
        assert ("bfloat16 weight" in linear.kernel) == widened
        assert linear.nbytes == 16 * 8 * dtype.itemsize
        assert linear.batch_invariant
    assert linear.reason
    assert linear.kernel in str(linear)
    assert linear.config()["weight_dtype"] == str(dtype).removeprefix("torch.")


def test_rows_are_widened_exactly_where_bf16_is_slow(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(dense, "_bf16_gemm", lambda answer=supported: answer)
        expected = torch.bfloat16 if supported else torch.float32
        assert row_dtype(torch.bfloat16, CPU) == expected
        assert row_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
        assert row_dtype(torch.float32, CPU) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(24,), (24, 24, 24), (8, 16)])
def test_weights_come_back_bit_for_bit(dense_backend, dtype, sizes):
    weights = [torch.randn(n, 16).to(dtype) for n in sizes]
    weights[0][0, :4] = torch.tensor([1e-39, -0.0, float("inf"), 3e38])
    linear = PackedLinear(weights)
    back = linear.dense_weights()
    assert [w.shape for w in back] == [w.shape for w in weights]
    for got, want in zip(back, weights, strict=True):
        assert_exact(got.view(torch.int16), want.view(torch.int16))
        assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    assert_exact(linear.dense_weight(), torch.cat(weights))


def test_several_linears_are_one():
    linears = [nn.Linear(16, n) for n in (8, 24, 3)]
    packed = PackedLinear.from_linears(*linears)
    x = torch.randn(5, 16)
    with torch.no_grad():
        native_result = torch.cat([linear(x) for linear in linears], 1)
        expected = torch.cat([copy.deepcopy(m).double()(x.double()) for m in linears], 1)
        result = packed(x)
    assert_close_to_native(result, native_result, expected)
    with pytest.raises(RuntimeError, match="a weight that was packed requires a gradient"):
        packed(x)
    with pytest.raises(ValueError, match="some have a bias"):
        PackedLinear.from_linears(linears[0], nn.Linear(16, 8, bias=False))


def test_a_dense_weight_is_saved_and_nothing_is_trained():
    linear = nn.Linear(16, 8).requires_grad_(False)
    other = PackedLinear.from_linears(nn.Linear(16, 8).requires_grad_(False))
    packed = PackedLinear.from_linears(linear)
    assert list(packed.parameters()) == []
    state = packed.state_dict()
    assert_exact(state["weight"], linear.weight.detach())
    assert_exact(state["bias"], linear.bias.detach())
    other.load_state_dict(state)
    x = torch.randn(3, 16)
    assert_exact(other(x), packed(x))
    empty = PackedLinear.from_config(packed.config())
    empty.load_state_dict(state)
    assert_exact(empty(x), packed(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r"weight: got shape \[4, 16\], need \[8, 16\]"):
        other.load_state_dict({**state, "weight": state["weight"][:4]})


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(dense_backend, copier, dtype):
    packed = PackedLinear(
        [torch.randn(24, 16).to(dtype)], torch.randn(24).to(dtype), activation="gelu"
    )
    twin = copier(packed)
    x = torch.randn(3, 16).to(packed.compute_dtype)
    assert_exact(twin(x), packed(x))
    assert_exact(twin.dense_weight(), packed.dense_weight())
    assert (twin.backend, twin.kernel, twin.reason) == (
        packed.backend,
        packed.kernel,
        packed.reason,
    )


def test_casts_are_refused_and_no_casts_are_free():
    packed = PackedLinear([torch.randn(24, 16)])
    assert packed.float() is packed
    assert packed.to("cpu") is packed
    with pytest.raises(RuntimeError, match="cannot be cast or moved"):
        packed.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot be cast or moved"):
        packed.to("meta")


def test_bad_arguments():
    weight = torch.randn(8, 8)
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        PackedLinear([weight], activation="relu")
    with pytest.raises(ValueError, match="compute_dtype"):
        PackedLinear([weight], compute_dtype=torch.bfloat16)


def test_a_library_that_computes_wrongly_is_not_used(monkeypatch):
    """The self-check at first use, and the check that the packed weight comes back."""
    real = torch.ops.mkldnn._linear_pointwise

    def off_by_a_little(*args):
        return real(*args) * 1.5

    backends.why_no_onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", off_by_a_little)
    assert "self-check" in backends.why_no_onednn(torch.float32)
    monkeypatch.undo()
    backends.why_no_onednn.cache_clear()
    monkeypatch.setattr(backends, "BACKENDS", (backends.OneDNN, backends.FLinear))
    monkeypatch.setattr(backends, "same_bits", lambda a, b: False)
    packed = PackedLinear([torch.randn(8, 8)])
    assert packed.backend == "linear"
    assert "unchanged" in packed.reason


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_are_known_by_their_values(name):
    kinds = {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
    }
    assert gelu_kind(ACT2FN[name]) == kinds.get(name)


def test_activations_that_are_no_function_of_one_tensor():
    assert gelu_kind(lambda x: x[:3]) is None
    assert gelu_kind(lambda x: 1 / 0) is None
    assert gelu_kind(F.gelu) == "gelu"
    assert gelu_kind(nn.GELU("tanh")) == "gelu_tanh"


def test_the_choice_is_printed_with_its_reasons(monkeypatch):
    table = choices()
    assert list(table) == ["float32", "bfloat16", "float16"]
    for line in table.values():
        assert "filbert linear_dense" in line
        assert _load.isa() in line
    assert "float16 weight" in table["float16"]
    assert str(table).count("\n") == 2
    monkeypatch.setitem(_load.missing, "ops", "left out by a test")
    assert "not filbert: filbert's operators are not compiled here" in choices()["float32"]
