"""What a run needs, against what hosts have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from occult_train import memory
from occult_train.config import Config
from occult_train.data.loader import resolve_vocab
from occult_train.launcher.doctor.host import Host

SHARE = 0.95
"""Of what is free, that may be needed: an allocator loses some."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: master weight and moments."""


@dataclass(frozen=True)
class Need:
    """Of a run."""

    rank: memory.MemoryNeed
    disk: float
    """Bytes of the checkpoints that are kept, and of the one being written."""
    words: str
    findings: list[str]


def estimate(config: Config, ranks: int, hosts: Sequence[Host]) -> Need:
    """What `config` needs on `ranks` ranks, and where there is less.

    Raises:
        UserError: it cannot run on as many ranks, or its vocabulary cannot be told.
    """
    config.validate_ranks(ranks)
    vocabulary = config.model.vocab_size or resolve_vocab(config.data, 0)
    config = replace(config, model=replace(config.model, vocab_size=vocabulary))
    answered = [host for host in hosts if host.facts is not None]
    device = "cuda" if any(host.facts and host.facts.gpus for host in answered) else "cpu"
    need = memory.estimate(config, ranks, device)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in vars(need).items())
    words = f"memory: about {need.total / 1e9:.1f} GB a rank on {ranks} ranks, of which in GB: {parts}"
    found = [line for host in answered for line in _lacking(host, need, device)]
    findings = [f"{line}; {_less(config)}" for line in found]
    # saving the end alone keeps what was there until it is complete
    kept = config.checkpoint.keep or 1
    return Need(need, (kept + 1) * STATE_BYTES * config.model.num_params(), words, findings)


def _lacking(host: Host, need: memory.MemoryNeed, device: str) -> Iterator[str]:
    assert host.facts is not None
    if device == "cpu":
        wanted, free = need.total * len(host.slots), host.facts.memory_free
        if wanted > SHARE * free:
            yield f"{host.name}: {len(host.slots)} ranks need {wanted / 1e9:.1f} GB, {free / 1e9:.1f} are free"
    for number in host.slots if device == "cuda" else []:
        free = host.facts.gpus[number]["memory_free"] if number < len(host.facts.gpus) else 0
        if need.total > SHARE * free:
            yield f"{host.name} GPU {number}: a rank needs {need.total / 1e9:.1f} GB, {free / 1e9:.1f} are free"


def _less(config: Config) -> str:
    """What would need less, of the settings that are not there yet."""
    ways = []
    if config.train.micro_batch_size > 1:
        ways.append(f"train.micro_batch_size below {config.train.micro_batch_size}")
    if config.train.activation_checkpointing == "none":
        ways.append("train.activation_checkpointing=selective")
    if config.train.precision == "fp32":
        ways.append("train.precision=bf16")
    if config.zero.stage < 3:
        ways.append(f"zero.stage above {config.zero.stage}")
    ways.append(f"parallel.expert above {config.parallel.expert}" if config.parallel.expert < 8 else "more ranks")
    return f"try {', '.join(ways)}"
