"""Generation: ids that the tokenizer lacks are never chosen, and the context slides."""

import torch

from occult_train.inference import generate
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT
from occult_train.models.init import init_weights

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=8,
)


def _model() -> GPT:
    model = GPT(CONFIG)
    init_weights(model, 0)
    return model.eval()


def test_ids_of_the_padded_vocabulary_are_never_chosen() -> None:
    """A hot model chooses all ids alike; without the limit a third of them would be padding."""
    model = _model()
    free = generate(model, [1], 200, 50.0, 0, None)
    assert sum(token >= 43 for token in free) > 30
    assert max(generate(model, [1], 200, 50.0, 0, None, vocab_size=43)) < 43
    with torch.no_grad():
        model.lm_head.weight[43:] *= 100
    likeliest = generate(model, [1], 20, 0.0, 0, None, vocab_size=43)
    assert max(likeliest) < 43


def test_the_likeliest_tokens_are_those_of_the_last_context() -> None:
    """Past max_position_embeddings the model sees the last tokens only."""
    model, prompt = _model(), [5, 9, 2]
    made = generate(model, prompt, 12, 0.0, 0, None)
    tokens = prompt + made
    for at in range(len(prompt), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[max(0, at - 8) : at]]))[0, -1]
        assert int(logits.argmax()) == tokens[at]


def test_a_stop_token_ends_the_text_and_is_left_out() -> None:
    model = _model()
    made = generate(model, [1], 40, 50.0, 3, None)
    stop = made[10]
    assert generate(model, [1], 40, 50.0, 3, stop) == made[: made.index(stop)]
    assert generate(model, [1], 40, 50.0, 3, None) == made, "the seed decides"
