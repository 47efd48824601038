"""The whole trainer against one process of plain torch: batches, schedule, clipping, AdamW and balancing together."""

import json
from pathlib import Path

import plain_moe
import pytest
import torch
from plain_moe import Batches, PlainConfig, TrainRecord

from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.config import Config, load
from occult_train.data.loader import build_datasets, resolve_vocab
from occult_train.models.gpt import GPT
from occult_train.models.init import init_weights
from occult_train.testing import run_distributed

RANKS, MICRO, ACCUMULATION, STEPS = 2, 2, 3, 4
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
SETTINGS = [
    *(f"model.{name}={value}" for name, value in SHAPE.items()),
    "train.seed=2",
    f"train.steps={STEPS}",
    f"train.micro_batch_size={MICRO}",
    f"train.global_batch_size={RANKS * MICRO * ACCUMULATION}",
    "train.precision=fp32",
    "train.gradient_clipping=0.5",
    "data.sequence_length=11",
    "scheduler.warmup_steps=2",
    "optimizer.lr=3e-3",
    "optimizer.eps=1e-6",
    "moe.aux_loss_coef=0.05",
    "moe.z_loss_coef=0.02",
    "moe.bias_update_rate=0.02",
    "eval.interval=0",
    "checkpoint.interval=0",
    "monitor.interval=1",
    "parallel.expert=2",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",
]
RATES = [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5]
"""Two steps of warm-up, then half a cosine over two steps down to a tenth, at its start and in its middle."""


def train(_rank: int, arguments: list[str]) -> int:
    from occult_train.trainer import run

    return run(load(arguments))


def batches(config: Config) -> Batches:
    """Samples in a row: a micro-batch of rank 0, one of rank 1, the next accumulation step, the next optimizer step."""
    dataset, _ = build_datasets(config.data, config.train.seed, vocab_size=config.model.vocab_size)

    def micro_batch(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [dataset[first + row] for row in range(MICRO)]
        return torch.stack([s["input_ids"] for s in samples]), torch.stack([s["labels"] for s in samples])

    numbers = iter(range(0, STEPS * ACCUMULATION * RANKS * MICRO, MICRO))
    return [[[micro_batch(next(numbers)) for _ in range(RANKS)] for _ in range(ACCUMULATION)] for _ in range(STEPS)]


def reference(config: Config) -> TrainRecord:
    """The plain model's training, from the weights that the trainer draws."""
    model = GPT(config.model)
    init_weights(model, config.train.seed)
    return plain_moe.train(
        PlainConfig(vocab_size=config.model.vocab_size, **SHAPE),
        {name: value.detach().double() for name, value in model.named_parameters()},
        batches(config),
        lr=lambda step: config.optimizer.lr * RATES[step],
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip=config.train.gradient_clipping,
        aux_coef=config.moe.aux_loss_coef,
        z_coef=config.moe.z_loss_coef,
        balance=config.moe.balance,
        aux_scope=config.moe.aux_loss_scope,
        bias_rate=config.moe.bias_update_rate,
        decay=lambda name: "norm" not in name and not name.startswith("embed_tokens"),
    )


def whole(checkpoint: Checkpoint, prefix: str, name: str) -> torch.Tensor:
    """A logical tensor, a stack of experts put together by their ids."""
    if ".moe.experts." not in name:
        return checkpoint.read(prefix + name)
    return torch.stack([checkpoint.read(f"{prefix}{name}.{expert}") for expert in range(SHAPE["num_experts"])])


@pytest.mark.parametrize(
    "extra",
    [
        ["zero.stage=0"],
        ["zero.stage=1", "moe.balance=bias"],
        ["zero.stage=3", "moe.aux_loss_scope=global_batch", "train.activation_checkpointing=selective"],
    ],
    ids=["stage 0", "stage 1, bias", "stage 3, global aux loss, selective"],
)
def test_the_trainer_computes_what_plain_torch_does(tmp_path: Path, corpus: str, extra: list[str]) -> None:
    arguments = [*SETTINGS, *extra, f"data.path={corpus}", f"output={tmp_path}"]
    config = load(arguments)
    config.model.vocab_size = resolve_vocab(config.data, 0)
    record = reference(config)
    assert record.min_topk_gap > 1e-5
    assert min(record.grad_norms) > config.train.gradient_clipping
    assert run_distributed(train, RANKS, arguments, timeout=240) == [0, 0]

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "step"]
    for key, expected in (
        ("loss", record.losses),
        ("balance_loss", record.aux_losses),
        ("z_loss", record.z_losses),
        ("grad_norm", record.grad_norms),
        ("lr", [config.optimizer.lr * rate for rate in RATES]),
    ):
        assert [line[key] for line in logged] == pytest.approx(expected, rel=1e-5), key
    checkpoint = open_checkpoint(tmp_path)
    kinds = {"": record.params[-1], "exp_avg/": record.exp_avg, "exp_avg_sq/": record.exp_avg_sq}
    for prefix, tensors in kinds.items():
        for name, expected in tensors.items():
            error = (whole(checkpoint, prefix, name).double() - expected).norm() / expected.norm()
            assert error < 1e-5, f"{prefix}{name} is {error:.1e} off"
    for layer, bias in record.expert_bias[-1].items():
        assert checkpoint.state["expert_bias"][str(layer)] == pytest.approx(bias.tolist(), abs=1e-6)
