"""A converted model under everything torch does to modules, and every call it must refuse."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from filbert import ops
from filbert.conversion.in_place import convert, report, revert
from filbert.nn.dense.backends import FLinear
from models import FAMILIES, MASKS, assert_same_state, bits, build, randomise, run, swapped, tokens
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = MASKS["right"]


# --- what torch and transformers do to modules ---


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_is_an_ordinary_one(family, tmp_path):
    model = build(family, "SequenceClassification")
    plain = copy.deepcopy(model)
    convert(model).save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert_same_state(loaded.state_dict(), bits(plain))
    assert_exact(run(loaded), run(plain))
    assert swapped(model).is_packed


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_converted_model(assign):
    model, other = build("bert"), build("bert")
    randomise(other, std=0.3)
    state = bits(other)
    convert(model)
    stale = run(model)
    result = model.load_state_dict(copy.deepcopy(state), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(model.state_dict(), state)
    assert_exact(run(model), run(convert(other)))
    assert not torch.equal(run(model), stale)
    assert_same_state(revert(model).state_dict(), state)


def test_loading_reports_what_does_not_fit():
    model = convert(build("bert"))
    state, before = bits(model), run(model)
    key = "encoder.layer.0.output.dense.weight"
    strange = {**state, "encoder.layer.0.strange": torch.zeros(1)}
    del strange["encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(RuntimeError, match="strange") as caught:
        model.load_state_dict(strange)
    assert "encoder.layer.1.attention.self.key.bias" in str(caught.value)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, key: torch.zeros(3, 3)})
    assert swapped(model).is_packed
    assert_exact(run(model), before)


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_copies(dtype, how, in_inference_mode):
    model = convert(build("bert", "SequenceClassification", dtype=dtype))
    with torch.inference_mode(in_inference_mode):
        twin = COPIES[how](model)
    answer, state = run(model), bits(model)
    assert_exact(run(twin), answer)
    assert swapped(twin) is not swapped(model)
    assert_same_state(twin.state_dict(), state)
    revert(twin)
    assert_same_state(twin.state_dict(), state)
    assert_exact(run(model), answer)


def test_threads_that_save_at_once_save_weights():
    """The dense weights lie in the original for a moment, which all threads share."""
    model = convert(build("bert"))
    expected = bits(model)
    with ThreadPoolExecutor(4) as pool:
        for state in pool.map(lambda _: bits(model), range(100)):
            assert_same_state(state, expected)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_packs_again(first):
    second = torch.bfloat16 if first == torch.float32 else torch.float32
    model = build("bert", dtype=first)
    expected = convert(copy.deepcopy(model).to(second))
    convert(model).to(second)
    assert_exact(run(model), run(expected))
    assert_same_state(model.state_dict(), bits(expected))


def test_moves_that_change_nothing_are_free():
    model = convert(build("bert"))
    layers = swapped(model).packed_layers
    model.to("cpu").float().eval().requires_grad_(False)
    assert swapped(model).packed_layers is layers


@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.to("meta")])
def test_a_cast_to_where_there_are_no_kernels_is_an_error_when_called(cast):
    model = convert(build("bert"))
    cast(model)
    with pytest.raises(RuntimeError, match=r"cannot run it.*(dtype|device).*revert"):
        swapped(model)(torch.zeros(1, 2, 48))
    assert report(model)[1].now == "not runnable"


def test_a_cast_there_and_back():
    model = build("bert", dtype=torch.bfloat16)
    before = bits(model)
    convert(model).half()
    assert_same_state(model.bfloat16().state_dict(), bits(model))
    assert swapped(model).is_packed
    model.double()
    plain = revert(model)
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    assert list(plain.state_dict()) == list(before)


def test_parts_of_the_original_are_not_found_by_accident():
    model = convert(build("bert"))
    with pytest.raises(AttributeError, match=r"weights are packed; try filbert\.revert"):
        _ = model.encoder.layer
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.encoder.nonsense
    assert model.encoder.config is model.config
    assert not [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]


# --- parameters of a converted encoder ---


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_answer_for_number_shape_dtype_device_and_bytes(dtype, widened, monkeypatch):
    if widened:
        monkeypatch.setattr("filbert.nn.dense.linear._bf16_gemm", lambda: False)
    model = build("bert", dtype=dtype, hidden_size=384, intermediate_size=1536)
    plain = copy.deepcopy(model)
    convert(model)
    of_plain = dict(plain.named_parameters())
    of_ours = dict(model.named_parameters())
    assert list(of_ours) == list(of_plain)
    for name, p in of_ours.items():
        want = of_plain[name]
        assert (p.shape, p.dtype, p.device) == (want.shape, want.dtype, want.device), name
    assert next(model.encoder.parameters()).dtype == dtype
    assert model.num_parameters() == plain.num_parameters()
    # What lies in memory: weights as packed, and the embeddings; the rest is less than 1 %.
    held = sum(m.nbytes for layer in swapped(model).layers for _, m in layer.linears())
    outside = sum(p.nbytes for n, p in of_plain.items() if not n.startswith("encoder"))
    assert held + outside == pytest.approx(model.get_memory_footprint(), rel=0.01)
    state = bits(plain)
    assert_same_state(convert(copy.deepcopy(model)).state_dict(), state)
    assert_same_state(revert(model).state_dict(), state)


def _all_parameters(model):
    other = build("bert")
    randomise(other, std=0.3)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)


def _a_weight_in_inference_mode(model):
    with torch.inference_mode():
        dict(model.named_parameters())["encoder.layer.1.output.dense.weight"].mul_(2)


def _a_bias(model):
    with torch.no_grad():
        dict(model.named_parameters())["encoder.layer.0.attention.self.value.bias"].zero_()


def _a_tensor_of_the_state_dict(model):
    model.state_dict()["encoder.layer.0.intermediate.dense.weight"].mul_(2)


WRITES = [_all_parameters, _a_weight_in_inference_mode, _a_bias, _a_tensor_of_the_state_dict]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dense", ["filbert", "linear"])
def test_a_write_in_place_is_an_error_until_weights_are_loaded(write, dense, monkeypatch):
    if dense == "linear":
        monkeypatch.setattr("filbert.nn.dense.backends.BACKENDS", (FLinear,))
    model = convert(build("bert"))
    state = bits(model)
    write(model)
    for action in (run, revert, copy.deepcopy, lambda m: m.state_dict()):
        with pytest.raises(RuntimeError, match=r"written in place.*load_state_dict"):
            action(model)
    model.bfloat16().float()
    model.load_state_dict({"pooler.dense.bias": state["pooler.dense.bias"]}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({k: torch.zeros(3, 3, 3) for k in state})
    with pytest.raises(RuntimeError, match=r"written in place.*load_state_dict"):
        run(model)
    model.load_state_dict(state)
    assert_exact(run(model), run(convert(build("bert"))))
    assert_same_state(revert(model).state_dict(), state)


def test_writes_to_other_tensors_are_nobodys_business():
    model = convert(build("bert"))
    state = copy.deepcopy(model.state_dict())
    for value in state.values():
        value.zero_()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(1)
    model.load_state_dict(bits(model))
    for p in model.parameters():
        p.requires_grad_(False)
    run(model)


def test_where_weights_are_not_repacked_parameters_are_views_of_them(monkeypatch):
    monkeypatch.setattr("filbert.nn.dense.backends.BACKENDS", (FLinear,))
    model = build("bert")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    convert(model)
    for name, p in model.named_parameters():
        assert_exact(p.detach(), weights[name])
    fused = swapped(model).layers[0].attention.query_key_value.weight
    key = dict(model.named_parameters())["encoder.layer.0.attention.self.key.weight"]
    assert key.data_ptr() == fused[48:].data_ptr()


def test_an_optimizer_that_writes_linearly_stays_inside():
    model = convert(build("bert", hidden_size=384, intermediate_size=1536))
    state, answer = bits(model), run(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros(p.shape)
    optimizer.step()  # as many elements as a parameter has; PyTorch does not count it as a write
    assert_exact(run(model), answer)
    assert_same_state(revert(model).state_dict(), state)


def test_an_encoder_that_was_taken_out_says_where_its_weights_are():
    model, other = build("bert"), build("bert")
    other.encoder = model.encoder
    expected = run(other)
    convert(model)
    with pytest.raises(RuntimeError, match=r"taken out of its model before.*filbert\.revert"):
        run(other)
    for _ in range(2):
        model = copy.deepcopy(model)
    revert(model)
    assert_exact(run(model), expected)
    assert not model.encoder._forward_pre_hooks


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = build("bert")
    expected, state = run(copy.deepcopy(model), MASKS["none"]), bits(model)
    convert(model)
    torch.testing.assert_close(run(model, MASKS["none"]), expected, rtol=1e-4, atol=1e-4)
    assert_same_state(revert(model).state_dict(), state)


def test_parameters_have_no_zeros_between_odd_heads(monkeypatch):
    """On a GPU weights are dense and hold zeros behind heads that no kernel has as they are."""
    monkeypatch.setattr("filbert.nn.dense.backends.BACKENDS", (FLinear,))
    monkeypatch.setattr(ops, "head_dims", lambda _, own=ops.head_dims: own(torch.device("cuda")))
    model = build("bert", hidden_size=78)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    state = bits(model)
    convert(model)
    assert swapped(model).layers[0].attention.head_padding == 6
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert_same_state(model.state_dict(), state)


@pytest.mark.parametrize("how", ["assign", "add_module"])
def test_a_part_of_the_original_cannot_be_replaced(how):
    model = convert(build("bert"))
    layers = copy.deepcopy(revert(convert(build("bert"))).encoder.layer)
    replace = setattr if how == "assign" else type(model.encoder).add_module
    with pytest.raises(AttributeError, match=r"would not be used; try filbert\.revert"):
        replace(model.encoder, "layer", layers)


def test_torch_compile_compiles_around_the_encoder():
    model = convert(build("bert"))
    compiled = torch.compile(model, backend="eager")
    for mask in (MASKS["right"], MASKS["left"]):
        assert_exact(run(compiled, mask), run(model, mask))


# --- refused when called ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["", "SequenceClassification"])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_attentions_are_an_error_and_never_missing(family, head, by):
    model = convert(build(family, head, attention="eager"))
    arguments = {"output_attentions": True} if by == "argument" else {}
    model.config.output_attentions = by == "config"
    with pytest.raises(NotImplementedError, match="output_attentions"):
        run(model, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoder_hidden_states": torch.zeros(3, 9, 48)},
        {"head_mask": [torch.ones(3), None]},
        {"past_key_values": object()},
        {"is_causal": True},
        {"cu_seq_lens_q": torch.tensor([0, 9])},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_that_ask_for_more(arguments):
    encoder = swapped(convert(build("bert").requires_grad_(False)))
    hidden = torch.zeros(3, 9, 48)
    with pytest.raises(NotImplementedError, match=next(iter(arguments))):
        encoder(hidden, **arguments)
    names = ("head_mask", "use_cache", "position_ids", "past_key_values", "output_attentions")
    encoder(hidden, MASK, **dict.fromkeys(names))
    encoder(
        hidden, MASK, head_mask=[None, None], use_cache=True, position_ids=torch.arange(9)[None]
    )


def test_several_texts_in_one_row_are_refused_where_flash_attention_would_split_them():
    model = convert(build("bert").requires_grad_(False))
    model.config._attn_implementation = "flash_attention_2"
    hidden, positions = torch.zeros(1, 4, 48), torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(NotImplementedError, match="position_ids"):
        swapped(model)(hidden, None, position_ids=positions)
    swapped(model)(hidden, None, position_ids=torch.arange(4)[None])


def test_gradients_are_an_error_and_never_cut():
    model = convert(build("bert"))
    with pytest.raises(RuntimeError, match=r"inference only.*inference_mode"):
        model(tokens(MASK), attention_mask=MASK)
    with torch.no_grad():
        model(tokens(MASK), attention_mask=MASK)


def test_training_mode_is_an_error():
    model = convert(build("bert")).train()
    with pytest.raises(RuntimeError, match="training mode with dropout"):
        run(model)
    run(model.eval())


def test_causal_masks_are_an_error():
    encoder = swapped(convert(build("bert").requires_grad_(False)))
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, causal.clone(), additive):
        with pytest.raises(ValueError, match="different keys"):
            encoder(torch.zeros(3, 9, 48), mask)


@pytest.mark.parametrize(
    ("hidden", "mask", "error", "words"),
    [
        (torch.zeros(3, 9, 40), None, ValueError, r"need \[B, S, 48\]"),
        (torch.zeros(9, 48), None, ValueError, r"need \[B, S, 48\]"),
        (torch.zeros(3, 9, 48, dtype=torch.bfloat16), None, TypeError, "bfloat16"),
        (torch.zeros(3, 9, 48), torch.ones(3, 8), ValueError, "got 8 places"),
        (torch.zeros(3, 9, 48), torch.ones(2, 9), ValueError, "got 2 sequences"),
        (None, None, TypeError, "NoneType"),
    ],
)
def test_bad_input(hidden, mask, error, words):
    with pytest.raises(error, match=words):
        swapped(convert(build("bert").requires_grad_(False)))(hidden, mask)
