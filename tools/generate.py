"""`occult generate`: continue a text with a trained model."""

from typing import Annotated

import torch
import typer

from occult_train.inference import checkpoint_config, generate, load_model, open_run, run_tokenizer


def command(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder or a checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    length: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file, if not the run's.")] = "",
) -> None:
    """Print PROMPT and what the model makes of it."""
    opened = open_run(checkpoint)
    words = run_tokenizer(opened, tokenizer)
    bf16 = torch.cuda.is_available() and checkpoint_config(opened).train.precision == "bf16"
    model = load_model(
        opened, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if bf16 else torch.float32
    )
    start = words.encode(prompt) or [words.eod_id]
    made = generate(model, start, length, temperature, seed, words.eod_id, words.vocab_size)
    print(prompt + words.decode(made))
