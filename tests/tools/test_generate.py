"""Generation: who is in the batch and how many ranks there are does not matter; ids that the tokenizer lacks are never
chosen; the context slides; limits on sampling are those of transformers."""

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from occult_train.generation import Ending, Sampling, generate, pick, probabilities
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=8,
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], list(range(11, 23)), [40, 41]]
HOT = Sampling(temperature=50.0)


def _model(runtime: Runtime | None = None) -> GPT:
    """Weights are those of one process, whatever the grid."""
    model = GPT(CONFIG)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if runtime is None:
        return model.eval()
    spread, grid, weights = GPT(CONFIG, runtime), runtime.grid, model.state_dict()
    local = CONFIG.num_experts // grid.expert_size
    for name in [name for name in weights if ".experts." in name]:
        weights[name] = weights[name][grid.expert_rank * local :][:local]
    spread.load_state_dict(weights)
    return spread.eval()


def test_ids_of_the_padded_vocabulary_are_never_chosen() -> None:
    """A hot model chooses all ids alike; without the limit a third of them would be padding."""
    model = _model()
    (free,) = generate(model, [[1]], HOT, Ending(200))
    assert sum(token >= 43 for token in free) > 30
    assert max(generate(model, [[1]], HOT, Ending(200, vocab_size=43))[0]) < 43
    with torch.no_grad():
        model.lm_head.weight[43:] *= 100
    assert max(generate(model, [[1]], Sampling(), Ending(20, vocab_size=43))[0]) < 43


def test_the_likeliest_tokens_are_those_of_the_last_context() -> None:
    """From prompts shorter and longer than max_position_embeddings, past which the model sees the last tokens only."""
    model = _model()
    for prompt, made in zip(PROMPTS, generate(model, PROMPTS, Sampling(), Ending(12)), strict=True):
        tokens = prompt + made
        assert len(made) == 12
        for at in range(len(prompt), len(tokens)):
            with torch.no_grad():
                logits = model(torch.tensor([tokens[max(0, at - 8) : at]]))[0, -1]
            assert int(logits.argmax()) == tokens[at]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, seed=7), Sampling(3.0, 20, 0.8, 1)])
def test_a_sequence_does_not_depend_on_its_company(sampling: Sampling) -> None:
    model = _model()
    together = generate(model, PROMPTS, sampling, Ending(10))
    for i, prompt in enumerate(PROMPTS):
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed + i)
        assert generate(model, [prompt], own, Ending(10)) == [together[i]]


def test_a_stop_token_ends_the_text_and_is_left_out() -> None:
    model, seen = _model(), []
    (made,) = generate(model, [[1]], Sampling(50.0, seed=3), Ending(40))
    stop = made[10]
    short = generate(model, [[1], [1]], Sampling(50.0, seed=3), Ending(40, stop), lambda *token: seen.append(token))
    assert short[0] == made[: made.index(stop)]
    assert [token for row, token in seen if row == 0] == short[0]
    assert [token for row, token in seen if row == 1] == short[1]
    assert len(short[1]) > len(short[0]), "the other goes on"
    assert generate(model, [[1]], Sampling(50.0, seed=3), Ending(40)) == [made], "the seed decides"
    assert generate(model, [[1]], Sampling(50.0, seed=4), Ending(40)) != [made], "the seed decides"


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (30, 0.9), (100, 0.05), (1, 1.0)])
def test_probabilities_are_those_of_transformers(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    ids: Any = None
    expected = TemperatureLogitsWarper(1.7)(ids, logits)
    expected = TopKLogitsWarper(top_k)(ids, expected) if top_k else expected
    expected = (TopPLogitsWarper(top_p)(ids, expected) if top_p < 1 else expected).softmax(dim=1)
    got = probabilities(logits, Sampling(1.7, top_k, top_p))
    assert torch.equal(got > 0, expected > 0)
    assert torch.allclose(got, expected, rtol=1e-5, atol=0)


def test_draws_follow_the_probabilities() -> None:
    """Evenly spaced numbers give each token its share; the ends of the range give tokens that may be chosen."""
    logits, sampling = torch.tensor([[0.0, 2.0, 1.0, -1.0]]), Sampling(1.0, top_k=3)
    numbers = (torch.arange(10_000) + 0.5) / 10_000
    drawn = pick(logits.expand(10_000, 4), sampling, numbers).bincount(minlength=4) / 10_000
    assert torch.allclose(drawn, probabilities(logits, sampling)[0], atol=2e-4)
    ends = pick(logits.expand(2, 4), Sampling(1.0, top_k=1), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [1, 1]


def on_ranks(rank: int, ranks: int, cases: list[tuple[Any, Sampling, Ending]]) -> list[list[list[list[int]]]]:
    names = ("dedup", "all_to_all", *(["hierarchical"] if ranks == 4 else []))  # on two nodes of two ranks, pretended
    models = [_model(Runtime(grid=Grid.create(ranks, ranks // 2), dispatcher=name)) for name in names]
    return [[generate(model, *case) for model in models] for case in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_process_gives(ranks: int) -> None:
    """More and fewer prompts than ranks; sequences that end early on some ranks, at once on others, or never."""
    model = _model()
    stops = [row[3] for row in generate(model, PROMPTS, Sampling(), Ending(4))]
    cases: list[tuple[Any, Sampling, Ending]] = [
        (PROMPTS, Sampling(), Ending(10)),
        (PROMPTS, Sampling(3.0, 20, 0.9, 5), Ending(10)),
        (PROMPTS[:1], Sampling(), Ending(6)),
        *((PROMPTS, Sampling(), Ending(10, stop)) for stop in stops[:2]),
    ]
    expected = [generate(model, *case) for case in cases]
    assert len({len(row) for row in expected[3]}) > 1, "some end before others"
    for found in run_distributed(on_ranks, ranks, ranks, cases):
        for got, right in zip(found, expected, strict=True):
            assert got == [right] * (3 if ranks == 4 else 2)
