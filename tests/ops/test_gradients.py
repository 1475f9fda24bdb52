"""No gradient is ever lost: where one would be recorded, every operator and module raises."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from binarize_cases import own
from calls import CALLS
from cases import normal
from filbert import _load, binarize, ops
from filbert.conversion.hugging_face.layers import read_encoder
from filbert.conversion.in_place import convert
from filbert.nn import PackedEncoder, PackedLinear
from filbert.ops.shared.operator import OPERATORS
from filbert.packed.batch import PackedBatch
from models import FAMILIES, MASKS, build, run, swapped, tokens
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = [(name, operand) for name, call in CALLS.items() for operand in call()[1]]
WITH_FLOATS = [name for name, call in CALLS.items() if call()[1]]


def test_every_operator_is_here():
    assert set(CALLS) == set(OPERATORS)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize(("name", "operand"), REFUSED)
def test_operators_refuse(name, operand, compiled, monkeypatch):
    """For each operand alone, as a leaf and as what another operation made of one; nothing is
    written before."""
    if not compiled:
        monkeypatch.setitem(_load.missing, "ops", "left out by a test")
        monkeypatch.setattr(_load, "warn_once", lambda reason: None)
    function, floats, others = CALLS[name]()
    leaf = floats[operand].clone().requires_grad_()
    for tensor in (leaf, leaf * 1):
        with pytest.raises(RuntimeError, match=f"{name} is inference only: .*inference_mode"):
            function(**{**floats, operand: tensor}, **others)
        assert_exact(tensor.detach(), floats[operand])
    assert leaf.grad is None


@pytest.mark.parametrize("name", WITH_FLOATS)
def test_operators_run_where_no_gradient_is_recorded(name):
    function, floats, others = CALLS[name]()
    want = function(**{k: t.clone() for k, t in floats.items()}, **others)
    for mode in (torch.no_grad, torch.inference_mode):
        leaves = {k: t.clone().requires_grad_() for k, t in floats.items()}
        with mode():
            got = function(**leaves, **others)
        pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
        for a, b in pairs:
            assert_exact(a.detach(), b)


@pytest.mark.parametrize(("compiler", "fullgraph"), [("eager", True), ("aot_eager", False)])
@pytest.mark.parametrize("name", WITH_FLOATS)
def test_operators_refuse_under_torch_compile(name, fullgraph, compiler):
    torch._dynamo.reset()
    function, floats, others = CALLS[name]()
    first, *_ = floats
    step = torch.compile(
        lambda x: function(**{**floats, first: x * 1}, **others),
        backend=compiler,
        fullgraph=fullgraph,
    )
    with pytest.raises(RuntimeError, match=f"{name} is inference only"):
        step(floats[first].requires_grad_())


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    ],
    ids=["grad", "jvp"],
)
def test_function_transforms_are_refused(differentiate):
    def total(x):
        return ops.gather_rows(x * 1, torch.arange(2)).sum()

    with pytest.raises(RuntimeError, match="gather_rows is inference only"):
        differentiate(total, normal(3, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["bias_gelu_", "norm_residual_"])
def test_writing_over_what_a_backward_pass_needs_is_noticed(name, mode):
    function, floats, others = CALLS[name]()
    x = floats.pop("x").requires_grad_()
    saved = x.exp()
    with mode():
        function(saved, **floats, **others)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_an_operand_on_another_device(name):
    """With one on the meta device the dispatcher would run the fake and return a meta tensor."""
    function, floats, others = CALLS[name]()
    operands = {**floats, **{k: v for k, v in others.items() if isinstance(v, torch.Tensor)}}
    rest = {k: v for k, v in others.items() if k not in operands}
    first, *more = sorted(
        operands, key=lambda k: k not in ("x", "q", "words", "cu_seqlens_q", "ids")
    )
    for moved in more:
        words = rf"{name}: device of {moved}; got meta; need cpu, .*{moved}\.to\('cpu'\)"
        with pytest.raises(RuntimeError, match=words):
            function(**{**operands, moved: operands[moved].to("meta")}, **rest)
    if more:
        with pytest.raises(RuntimeError, match=f"{name}: device of .*; got cpu; need meta"):
            function(**{**operands, first: operands[first].to("meta")}, **rest)


# --- modules ---


def frozen_below(family, head=""):
    """A converted model of which only the encoder would be trained."""
    model = build(family, head)
    encoder = model.base_model.transformer if family == "distilbert" else model.base_model.encoder
    model.requires_grad_(False)
    encoder.requires_grad_(True)
    return convert(model)


def call(model, mask=MASKS["right"]):
    return model(tokens(mask), attention_mask=mask)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_require_a_gradient(family):
    """The input asks for none, and the weights are packed: plain autograd would not notice."""
    model = frozen_below(family, "SequenceClassification")
    want = run(model)
    words = r"weights .*require one.*inference_mode.*no_grad.*requires_grad_.*revert"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            call(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_exact(call(model), want)
    model.requires_grad_(False)
    assert_exact(call(model), want)  # nothing is to be trained, and gradients may be recorded
    for parameter in swapped(model).parameters():
        parameter.requires_grad_(True)
        with pytest.raises(RuntimeError, match="inference only"):
            call(model)
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(model.state_dict(), assign=True) and model,
    ],
    ids=["deepcopy", "pickle", "cast", "load"],
)
def test_weights_are_still_watched_after(change):
    model = change(frozen_below("bert"))
    with pytest.raises(RuntimeError, match="inference only"):
        call(model)
    with torch.no_grad():
        call(model)
    model.requires_grad_(False)
    call(model)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_of_a_converted_model(grad):
    model = convert(build("bert").requires_grad_(False))
    x = torch.randn(1, 4, 48)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="inference only: the input has a tangent"):
            model(inputs_embeds=dual)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="inference only"):
        torch.func.jvp(lambda y: model(inputs_embeds=y)[0], (x,), (torch.ones_like(x),))


def test_an_output_of_a_frozen_model_feeds_what_is_trained():
    model = build("bert").requires_grad_(False)
    probe = nn.Linear(48, 2)
    rows = call(convert(model))
    assert not rows.is_inference()
    probe(rows).sum().backward()
    assert probe.weight.grad is not None


def test_a_packed_encoder_by_itself():
    model, mask = build("bert"), MASKS["right"]
    rows = normal(*mask.shape, 48)
    for trained in (True, False):
        encoder = PackedEncoder.from_parts(
            read_encoder(model.encoder.requires_grad_(trained))[0]
        ).eval()
        if trained:
            with pytest.raises(RuntimeError, match="inference only"):
                encoder(rows, mask)
        else:
            encoder(rows, mask)
        with pytest.raises(RuntimeError, match="inference only"):
            encoder(rows.clone().requires_grad_(), mask)


def test_a_packed_linear_by_itself():
    linear = PackedLinear([normal(8, 6)], normal(8), activation="gelu")
    with pytest.raises(RuntimeError, match="inference only"):
        linear(normal(3, 6).requires_grad_())
    linear(normal(3, 6))
    with pytest.raises(RuntimeError, match="inference only"):
        torch.func.jvp(linear, (normal(3, 6),), (normal(3, 6),))


def test_norms_of_a_binary_model():
    model = binarize(own("bibert"))
    model.encoder.layers[0].attn_norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="inference only: norm_weight requires a gradient"):
        model(tokens(MASKS["right"]) % 23, attention_mask=MASKS["right"])


@pytest.mark.parametrize("where", ["leaf", "made"])
def test_the_layer_of_a_packed_encoder(where):
    parts = read_encoder(build("bert").encoder)[0]
    layer = PackedEncoder.from_parts(parts).layers[0]
    rows = normal(4, 48).requires_grad_()
    rows = rows if where == "leaf" else rows * 1
    with pytest.raises(RuntimeError, match="inference only"):
        layer(rows, PackedBatch.full(1, 4))
