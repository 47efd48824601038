"""Step by step with cached keys and values, a model computes what it computes over the whole sequence."""

import pytest
import torch

from occult_train.models.cache import KVCache
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT
from occult_train.models.init import init_weights

TOLERANCE = 1e-5
VARIANTS = {
    "as many heads": {"num_key_value_heads": 6},
    "grouped": {},
    "norm of all heads, clipped": {"qk_norm": "full", "clip_qkv": 0.5},
    "norm of each head, wide heads": {"qk_norm": "head", "head_dim": 12, "rope_theta": 5e5},
    "biased, one head": {"attention_bias": "all", "num_key_value_heads": 1},
    "dense in between, shared": {"dense_layers": [1], "dense_intermediate_size": 20},
}


@pytest.fixture(params=VARIANTS, scope="module")
def model(request: pytest.FixtureRequest) -> GPT:
    sizes = {
        **{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 3},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3},
        "max_position_embeddings": 32,
    }
    built = GPT(ModelConfig(**{**sizes, **VARIANTS[request.param]}))
    init_weights(built, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():  # large enough that positions and neighbours matter
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return built.eval()


def cache(model: GPT, pads: list[int], columns: int) -> KVCache:
    return KVCache(model.config, pads, columns, model.lm_head.weight.data)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(2))


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("pieces", [(20,), (7, 1, 1, 1, 10), (1,) * 20, (5, 15)])
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(model: GPT, pieces: tuple[int, ...]) -> None:
    ids, kept = tokens(3, 20), cache(model, [0, 0, 0], 23)
    got = torch.cat([model.predict(piece, kept, last=False) for piece in ids.split(pieces, dim=1)], dim=1)
    assert difference(got, model(ids)) < TOLERANCE


@torch.no_grad()
def test_rows_of_other_lengths_do_not_change_a_row(model: GPT) -> None:
    """Padded on the left, and continued together: each row's logits are those of the row alone."""
    ids, lengths, more = tokens(4, 20), [14, 1, 9, 13], 6
    pads = [14 - n for n in lengths]
    kept = cache(model, pads, 20)
    steps = [model.predict(ids[:, :14], kept)]
    steps += [model.predict(ids[:, 14 + i : 15 + i], kept) for i in range(more)]
    got = torch.cat(steps, dim=1)
    for row, pad in enumerate(pads):
        assert difference(got[row], model(ids[row : row + 1, pad:])[0, -more - 1 :]) < TOLERANCE
    changed = torch.where(torch.arange(14) < torch.tensor(pads)[:, None], 60, ids[:, :14])
    other = model.predict(changed, cache(model, pads, 20))
    assert difference(other, steps[0]) < TOLERANCE, "what stands in the padding does not matter"


def test_what_does_not_fit_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="sequence of 33 is longer than max_position_embeddings=32"):
        model.predict(tokens(1, 33), cache(model, [0], 40))
    model.predict(tokens(1, 33), cache(model, [1], 40))
    with pytest.raises(ValueError, match="5 columns, the cache has room for 4"):
        model.predict(tokens(1, 5), cache(model, [0], 4))
    with pytest.raises(ValueError, match="a batch of 2 rows, the cache holds 1"):
        model.predict(tokens(2, 5), cache(model, [0], 8))
