"""Generated settings: what is valid builds, what is not gives one short line; no traceback, no hang, little memory.

The count is `OCCULT_GENERATED_CONFIGS` (10,000) in the slow test, a few in the default one.
"""

import os
import resource
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from occult_train import beginning
from occult_train.config import CHOICES, PLACERS, Config, load, to_yaml
from occult_train.data.loader import build_datasets, resolve_vocab
from occult_train.deepspeed_options import ALLOWED
from occult_train.engine import check_deepspeed, choose_way, deepspeed_config, freeze, learning_rate, runtime
from occult_train.errors import LONGEST, UserError
from occult_train.models import config as models
from occult_train.models import scmoe_config
from occult_train.models.gpt import GPT
from occult_train.moe.pruning import POLICIES
from occult_train.parallel.grid import Grid
from occult_train.similarity_tables import find_tables
from occult_train.tools.prepare import prepare

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(path) for path in (ROOT / "configs").rglob("*.yaml"))
SECONDS = 60
"""For an example; most take a tenth of one."""
MEMORY = 2 * 2**30
"""Bytes by which the process may grow in an example."""

# --- what users type

WORDS = CHOICES | {
    "model.qk_norm": models.QK_NORMS,
    "model.attention_bias": models.ATTENTION_BIASES,
    "model.scmoe.block": scmoe_config.SHORTCUT_BLOCKS,
    "model.scmoe.position": scmoe_config.POSITIONS,
    "model.scmoe.combine": scmoe_config.COMBINATIONS,
    "model.scmoe.every": (1, 2),
    "moe.prune.policy": POLICIES,
    "moe.replace.method": PLACERS,
    "moe.overlap": ("auto", "none", "2", "0"),
    "moe.schedule": ("auto", "none", "0", "3", "²"),
    "moe.placement": ("auto", "contiguous", "/dev/zero", "configs", "setup.py", "nowhere.json"),
    "train.trainable": ("all", "moe", "w1", "(", "^$", r"layers\.1\.", "(a+)+$"),
    "model.from_pretrained": ("", "nowhere", "configs", "/dev/null", "/"),
    "data.path": ("", "nowhere", "/dev/zero"),
}
"""Settings whose right values are a few words; wrong ones are tried, too."""
NUMBERS = [0, 1, 2, 3, 4, 8, 16, 64, 128, 1024]
BORDERS = [-1, 5, 7, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, 10**400, -(10**30)]
REALS = [0.0, 1.0, 0.5, 1e-8, 1e-3, 0.9, 100.0]
STRANGE = ["nan", ".nan", "inf", ".inf", "-.inf", "-0.0", "1e999", "1e-400", "5e-324", "-1.5", "0x10", "1_000", "1:30"]
JUNK = [
    *("", "''", "' '", "null", "~", "true", "no", "a", "ÄÖ日本", "a b", "a\nb", "\x00", "\ud800", '"\\0"', '"\\uD800"'),
    *("[]", "[1]", "[1, 2]", "[a, null]", "[[]]", "[nan]", "[1", "{}", "{a: 1}", "{1: 2}", "{1: {2: 3}}", "{a}"),
    *("{null: 1}", "{1.5: 2}", "{true: 1}", "&a [*a]", "*x", "!!python/none x", "!!set {a}", "!!binary aGk="),
    *("2026-01-01", "%", "@", "`", "'", '"', "#", "# a", "a: b", "a: b: c", "- 1", "|", ">", "?", "-", "{: }"),
    *("${oc.env:HOME}", "${oc.env:OCCULT_NOT_SET}", "${oc.env:OCCULT_NOT_SET,8}", "${train.steps}", "${nope}"),
    *("${output}", "${model}", "${moe.prune}", "${..steps}", "${oc.create:{a: 1}}", "${oc.decode:'[1'}", "${", "$"),
    *("${${output}}", "${oc.dict.keys:model}", "???", "1=2", "--help", "../..", "/", "/dev/null", "a.yaml", "=", "\\"),
    *("x" * 300, "9" * 5000, "0" * 400, "[" * 2000, "{a: " * 500),
]
NAMES = [
    *("", ".", "..", "a", "train", "train.", ".train", "train.step", "model.scmoe", "moe.prune", "data.blend"),
    *("deepspeed", "deepspeed.bf16", "deepspeed.zero_optimization", "deepspeed.zero_optimization.stage"),
    *("deepspeed.wandb.enabled", "deepspeed.flops_profiler.enabled", "data.blend.a", "data.blend.a.b"),
    *("moe.prune.layers.1", "moe.prune.schedule.5", "train.steps.a", "train[steps]", "model.dense_layers.0"),
    *("model.dense_layers[0]", "optimizer.betas.7", "[", "a\nb", "${output}", "x" * 300, "__class__"),
    *("train.__dict__", "--local_rank", "1", "null", "Train.steps", "train..steps", "train.steps ", "a.yaml", "日本"),
]


def leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of each setting that is no section, by path."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        if isinstance(field.type, type) and is_dataclass(field.type):
            found |= leaves(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field.type
    return found


LEAVES = leaves(Config)
integers = st.sampled_from(NUMBERS) | st.integers(0, 40) | st.sampled_from(BORDERS) | st.integers()
reals = st.sampled_from(REALS) | st.floats(0, 2) | st.floats()
junk = st.sampled_from(JUNK) | st.text(max_size=12)


def right(path: str) -> SearchStrategy[Any]:
    """Values that `path` may well take."""
    if path in WORDS:
        return st.sampled_from(WORDS[path])
    kind = LEAVES[path]
    if get_origin(kind) is list:
        return st.lists(integers if get_args(kind)[0] is int else reals, max_size=4)
    if get_origin(kind) is dict:
        key, value = get_args(kind)
        return st.dictionaries(integers if key is int else junk, integers if value is int else reals | junk, max_size=3)
    return {int: integers, float: reals, bool: st.booleans(), str: junk}[kind]


def typed(value: Any) -> str:
    """As it stands behind the equals sign."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


anything = junk | integers | reals | st.sampled_from(STRANGE) | st.lists(integers | junk, max_size=3)
known = st.sampled_from(sorted(LEAVES))
extra = st.sampled_from([f"deepspeed.{name}" for name in ALLOWED])
section = st.dictionaries(st.sampled_from(["enabled", "output_path", "a"]), anything | st.booleans(), max_size=2)
pairs = known.flatmap(lambda path: st.tuples(st.just(path), right(path)))
mixed = pairs | pairs | st.tuples(known | extra | st.sampled_from(NAMES), anything | section)
overrides = mixed.map(lambda pair: f"{pair[0]}={typed(pair[1])}")


def nested(given: list[tuple[str, Any]]) -> dict[str, Any]:
    """Paths and values as sections in one another."""
    top: dict[str, Any] = {}
    for path, value in given:
        *sections, name = path.split(".")
        at = top
        for section in sections:
            inner = at.setdefault(section, {})
            if not isinstance(inner, dict):
                break
            at = inner
        at[name] = value
    return top


documents = st.lists(mixed, max_size=4).map(lambda given: yaml.safe_dump(nested(given))) | junk | st.text(max_size=30)

# --- what becomes of it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of more tokens than the shipped files' sequences."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{f"a, b and {i}. " * 120}"}}\n' for i in range(40)))
    prepare([str(folder / "text.jsonl")], folder / "corpus", vocab_size=280, workers=1, valid_fraction=0.2)
    return folder / "corpus"


def bases(corpus: Path) -> list[list[str]]:
    """What settings are added to: each shipped file, with a corpus, beginning at random, pruned for eight devices."""
    found = [[path, f"data.path={corpus}", "model.from_pretrained="] for path in CONFIGS]
    return [[*base, "moe.prune.groups=8"] if base[0].endswith("pruned.yaml") else base for base in found]


def build(arguments: list[str]) -> None:
    """All that a rank does with settings before it computes, without DeepSpeed's engine."""
    config = load(arguments)
    check_deepspeed(config)
    ranks = config.parallel.expert
    config.validate_ranks(ranks)
    config.model.vocab_size = resolve_vocab(config.data, config.model.vocab_size)
    build_datasets(config.data, config.train.seed, vocab_size=config.model.vocab_size)
    start = beginning.find(config)
    if config.moe.prune.policy == "similarity":
        find_tables(config, start)
    grid = Grid(world_size=ranks, expert_size=ranks)
    way = choose_way(config, grid)[0] if ranks == 1 else None
    with torch.device("meta"):
        model = GPT(config.model, runtime(config, grid, way))
    freeze(model, config)
    deepspeed_config(config, ranks)
    assert sum(p.numel() for p in model.parameters()) > 0
    for step in (0, config.scheduler.warmup_steps, config.train.steps - 1):
        learning_rate(config, step)
    to_yaml(config)


def check(arguments: list[str]) -> str:
    """It builds, or one line says why not. Returns which."""
    try:
        build(arguments)
    except UserError as error:
        message = str(error)
        assert message.strip() == message != ""
        assert message.splitlines() == [message]
        assert len(message) <= LONGEST
        return "refused"
    return "built"


def run(count: int, corpus: Path) -> None:
    """Check that many, and that neither outcome is rare."""
    file, outcomes = corpus.parent / "more.yaml", {"built": 0, "refused": 0}

    @given(st.sampled_from(bases(corpus)), st.lists(overrides, max_size=3), st.none() | st.none() | documents)
    @settings(max_examples=count, deadline=SECONDS * 1000, database=None, suppress_health_check=list(HealthCheck))
    def every(base: list[str], typed: list[str], document: str | None) -> None:
        file.write_text(document or "", encoding="utf-8", errors="surrogatepass")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes[check([*base, *([] if document is None else [str(file)]), *typed])] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MEMORY, f"{grown:,} bytes"

    every()
    assert min(outcomes.values()) > count // 10, outcomes


def test_some_build_or_say_why_not(corpus: Path) -> None:
    run(40, corpus)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_build_or_say_why_not(corpus: Path) -> None:
    run(int(os.environ.get("OCCULT_GENERATED_CONFIGS", "10000")), corpus)
