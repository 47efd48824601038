"""`occult generate`: continue texts with a trained model, on one device or with its experts spread over ranks."""

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from occult_train.checkpoint.store import Checkpoint
from occult_train.data.tokenizer import Tokenizer
from occult_train.errors import DataError, UserError
from occult_train.generation import Ending, OnToken, Sampling, generate
from occult_train.inference import (
    describe_offload,
    describe_tally,
    fill_model,
    load_model,
    open_weights,
    serving_runtime,
    weights_config,
    weights_dtype,
    weights_tokenizer,
)
from occult_train.inference import (
    offload_experts as offload_model,
)
from occult_train.launcher.plan import count_gpus
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.ranks import Launch, run_tasks

DISPATCHERS = ("dedup", "all_to_all")
POLL = 0.05
DAY = 86400.0


@dataclass(frozen=True)
class Task:
    """What every rank does."""

    model: str
    prompts: list[list[int]]
    sampling: Sampling
    ending: Ending
    dispatcher: str
    ranks: int
    stream: str = ""
    """A file to which rank 0 writes the tokens of the first prompt, a line each."""
    offload: bool = False
    """Keep the routed experts in host memory."""
    budget: int = 0
    """Bytes for experts on the device then; 0 is usual_budget."""


def command(
    model: Annotated[str, typer.Argument(help="A run's folder, a checkpoint or a Hugging Face folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of texts to continue, one a line.")] = None,
    length: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 allows all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that together have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling; text i draws with seed + i.", min=0)] = 0,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file, if not the model's.")] = "",
    ep: Annotated[int, typer.Option(help="Ranks over which the experts are spread, one GPU each.", min=1)] = 1,
    dispatcher: Annotated[str, typer.Option(help="With --ep: dedup or all_to_all.")] = "dedup",
    offload_experts: Annotated[
        bool, typer.Option("--offload-experts", help="Keep routed experts in host memory, on the device those in use.")
    ] = False,
    expert_budget: Annotated[
        float,
        typer.Option(help="GB for experts on the device then. Default: twice what a token uses, and a layer's.", min=0),
    ] = 0.0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
) -> int:
    """Print each text and what the model makes of it: a single one as it arises, several when all are through."""
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p={top_p} must be above 0 and at most 1")
    cpu = cpu or not count_gpus()
    opened, texts = open_weights(model), _texts(prompt, prompts)
    _check_ranks(ep, dispatcher, weights_config(opened).num_experts, cpu)
    _check_offload(offload_experts, expert_budget, ep)
    words = weights_tokenizer(opened, tokenizer)
    starts = [[*words.begin, *words.encode(text)] or [words.eod_id] for text in texts]
    sampling = Sampling(temperature, top_k, top_p, seed)
    ending = Ending(length, words.eod_id, words.vocab_size)
    budget = max(int(expert_budget * 1e9), 1) if expert_budget else 0
    task = Task(
        model,
        starts,
        sampling,
        ending,
        dispatcher if ep > 1 else "local",
        ep,
        offload=offload_experts,
        budget=budget,
    )
    speaker = Speaker(words, texts[0], starts[0])
    single = len(texts) == 1
    made = _run(task, speaker.add if single else None, cpu)
    if single:
        speaker.end()
        return 0
    for i, (text, start, tokens) in enumerate(zip(texts, starts, made, strict=True)):
        print(f"--- {i + 1} of {len(texts)}\n{text}{continuation(words, start, tokens)}")
    return 0


class Speaker:
    """Prints a text, and its continuation as tokens come in."""

    def __init__(self, words: Tokenizer, text: str, start: list[int]) -> None:
        self.words, self.text, self.start = words, text, start
        self.tokens: list[int] = []
        self.shown = ""
        self.begun = False

    def add(self, sequence: int, token: int) -> None:
        """The next token; what ends within a letter waits for the rest of it."""
        self.tokens.append(token)
        text = continuation(self.words, self.start, self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """There are no more."""
        self._show(continuation(self.words, self.start, self.tokens))
        print()

    def _show(self, text: str) -> None:
        print("" if self.begun else self.text, text[len(self.shown) :], sep="", end="", flush=True)
        self.shown, self.begun = text, True


def continuation(words: Tokenizer, start: list[int], tokens: list[int]) -> str:
    """The text of tokens behind others; by themselves some tokenizers would drop a blank between."""
    before, whole = words.decode(start), words.decode([*start, *tokens])
    return whole[len(before) :] if whole.startswith(before) else words.decode(tokens)


def on_rank(task: Task) -> list[list[int]]:
    """Do a task on this rank; returns the new tokens of every prompt. Collective if there are several."""
    grid = Grid.create(task.ranks)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if grid.rank or not task.stream:
        return _generate(task, grid, device, None)
    with Path(task.stream).open("a") as file:
        return _generate(task, grid, device, lambda _, token: print(token, file=file, flush=True))


def _generate(task: Task, grid: Grid, device: torch.device, on_token: OnToken | None) -> list[list[int]]:
    opened = open_weights(task.model)
    dtype = weights_dtype(opened) if device.type == "cuda" else torch.float32
    runtime = serving_runtime(opened, grid, task.dispatcher, device, dtype)
    first = torch.device("cpu") if task.offload else device
    if isinstance(opened, Checkpoint):
        model = load_model(opened, first, dtype, runtime)
    else:
        model = fill_model(weights_config(opened), opened, first, dtype, runtime)
    if not task.offload:
        return generate(model, task.prompts, task.sampling, task.ending, on_token)
    places = offload_model(model, device, task.budget)
    _say(describe_offload(model, places))
    made = generate(model, task.prompts, task.sampling, task.ending, on_token)
    _say(describe_tally(places))
    return made


def _say(line: str) -> None:
    """Beside the text, which goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def _run(task: Task, on_token: OnToken | None, cpu: bool) -> list[list[int]]:
    """Here, or on ranks of their own."""
    if task.ranks == 1:
        return _generate(task, Grid(), torch.device("cpu" if cpu else "cuda"), on_token)
    with _stream(on_token) as path:
        launch = Launch(task.ranks, cpu, task_seconds=DAY)
        task = Task(**{**vars(task), "stream": path})
        for _, made, error in run_tasks("occult_train.tools.generate:on_rank", [task], launch):
            if error:
                raise RuntimeError(error)
            return made
    raise typer.Exit(0)  # under torchrun, a rank other than the first


@contextmanager
def _stream(on_token: OnToken | None) -> Iterator[str]:
    """The name of a file whose lines, tokens, are handed on while the context lasts; empty if nobody listens."""
    if on_token is None:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="occult-generate-") as folder:
        path, ended = Path(folder) / "tokens", threading.Event()
        path.touch()
        thread = threading.Thread(target=_follow, args=(path, on_token, ended))
        thread.start()
        try:
            yield str(path)
        finally:
            ended.set()
            thread.join()


def _follow(path: Path, on_token: OnToken, ended: threading.Event) -> None:
    with path.open() as file:
        left, last = "", False
        while not last:
            last = ended.wait(POLL)
            *lines, left = (left + file.read()).split("\n")
            for line in lines:
                on_token(0, int(line))


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    if prompts is None:
        return prompt or ["def "]
    try:
        lines = [line for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts={prompts} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise DataError(f"--prompts={prompts} holds no text")
    return [*(prompt or []), *lines]


def _check_offload(offload: bool, budget: float, ep: int) -> None:
    if budget and not offload:
        raise UserError(f"--expert-budget={budget:g} needs --offload-experts")
    if offload and ep > 1:
        raise UserError(f"--offload-experts keeps all experts in one process, so --ep={ep} cannot spread them")


def _check_ranks(ep: int, dispatcher: str, experts: int, cpu: bool) -> None:
    if dispatcher not in DISPATCHERS:
        why = "; it sends one copy per node, and this runs on one" if dispatcher == "hierarchical" else ""
        raise UserError(f"--dispatcher={dispatcher} is not one of {', '.join(DISPATCHERS)}{why}")
    if experts % ep:
        raise UserError(f"--ep={ep} does not divide the model's {experts} experts")
    if not cpu and ep > count_gpus():
        raise UserError(f"--ep={ep} needs as many GPUs; there are {count_gpus()} (--cpu uses none)")
