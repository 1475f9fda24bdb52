"""A text's answer has the same bits alone, in any batch, at any place of it, on any threads."""

from __future__ import annotations

import copy

import pytest
import torch

from filbert import _load, embed
from filbert.conversion.in_place import convert
from models import FAMILIES, build, swapped, tokens
from tolerances import assert_close_to_native, assert_exact

needs_operators = pytest.mark.skipif(
    not _load.have_ops(), reason="without filbert's operators a library multiplies"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [7, 1, 4, 7, 2, 6, 3, 5]


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(max(LENGTHS))
    return (places < torch.tensor(LENGTHS)[:, None]).long(), places


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, dtype):
    model = convert(build(family, dtype=dtype))
    encoder = swapped(model)
    mask, _ = texts()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(*mask.shape, encoder.hidden_size, generator=generator).to(dtype)

    def run(at: list[int], threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        keep, given = mask[at], rows[at]
        longest = int(keep.sum(1).max())
        drop = torch.where(keep[:, None, None, :longest] == 0, torch.finfo(dtype).min, 0.0)
        return encoder(given[:, :longest], drop.to(dtype))[0]

    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            alone = [run([i], 1)[0] for i in range(len(LENGTHS))]
            for threads in (1, 2, 3):
                for at in ([0, 1], [5, 2, 7], [3, 1, 4, 1, 5, 2, 6, 5, 3, 5], list(range(8))):
                    together = run(at, threads)
                    for place, text in enumerate(at):
                        length = LENGTHS[text]
                        assert_exact(together[place, :length], alone[text][:length])
    finally:
        torch.set_num_threads(before)


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm(dtype):
    from transformers import AutoModel

    from filbert.app.corpus import minilm_folder

    model = convert(AutoModel.from_pretrained(minilm_folder(), dtype=dtype).eval())
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 64, 17, 1, 40, 33]
    ids = torch.randint(1000, 20000, (6, 64), generator=generator)
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    with torch.inference_mode():
        together = model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors = embed(model, ids, mask)
        for i, length in enumerate(lengths):
            one = ids[i : i + 1, :length]
            whole = torch.ones_like(one)
            assert_exact(model(input_ids=one, attention_mask=whole).last_hidden_state[0],
                         together[i, :length])  # fmt: skip
            assert_exact(embed(model, one, whole)[0], vectors[i])


@needs_operators
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_float16_model_is_as_exact_as_the_float32_model_of_its_weights(family):
    half = build(family, dtype=torch.float16)
    wide = copy.deepcopy(half).float()
    ids, mask = tokens(torch.ones(2, 7, dtype=torch.long)), torch.ones(2, 7, dtype=torch.long)
    exact = copy.deepcopy(half).double()
    with torch.inference_mode():
        want = exact(input_ids=ids, attention_mask=mask)[0].double()
        of_wide = convert(wide)(input_ids=ids, attention_mask=mask)[0]
        ours = convert(half)(input_ids=ids, attention_mask=mask)[0]
    assert ours.dtype == torch.float16
    # Embeddings and head are PyTorch's, in float16: what they round is allowed for.
    assert_close_to_native(ours, of_wide.half(), want, room=4e-3 * float(want.abs().max()))
    assert {linear.weight_dtype for _, linear in swapped(half).layers[0].linears()} == {
        torch.float16
    }
    assert swapped(half).compute_dtype == torch.float32
