"""Import and export of a model of more than three billion parameters, in little memory. Needs 27 GB of disk."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from occult_train.hub.source import INDEX, expected_tensors, open_model
from occult_train.hub.tensorfile import write_file
from occult_train.models.config import ModelConfig
from occult_train.models.families.olmoe import OLMOE

SHAPE = ModelConfig(vocab_size=50304, num_hidden_layers=14, num_experts=32)
SHARD = 10**9
LAYER = 2 * (3 * 32 * 2048 * 1024 + 4 * 2048 * 2048)
"""Bytes of a layer in bf16."""
PROGRAM = """
import sys
from pathlib import Path
from occult_train.tools import export, import_
def peak():  # not getrusage's, which begins with that of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
before, (what, source, target) = peak(), sys.argv[1:]
if what == "import":
    import_.command(Path(source), Path(target), False)
else:
    export.command(source, Path(target), "auto", 1.0, "", False)
print(peak() - before)
"""


def write_random(folder: Path) -> None:
    """A model in OLMoE's layout, bf16, in files of a GB; every value differs from its neighbours."""
    folder.mkdir()
    config = OLMOE.hub_config(SHAPE) | {"dtype": "bfloat16", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    generator, files, size = torch.Generator().manual_seed(0), [{}], 0
    for name, shape in expected_tensors(SHAPE).items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD:
            files.append({})
            size = 0
        files[-1][OLMOE.to_hub(name)] = shape
        size += nbytes
    where = {}

    def tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[Tensor]:
        for shape in shapes.values():
            yield torch.randn(shape, generator=generator).mul_(0.02)

    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / file, shapes, torch.bfloat16, tensors(shapes))
        where |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def peak_of(*words: str) -> int:
    """Bytes of memory that the command needed at its peak beyond the interpreter and its modules."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_below_a_shard_and_a_layer(tmp_path: Path) -> None:
    assert SHAPE.num_params() > 3e9
    if shutil.disk_usage(tmp_path).free < 40 * 10**9:
        pytest.fail("needs 40 GB of free disk")
    model, run, back = (tmp_path / name for name in ("model", "run", "back"))
    try:
        write_random(model)
        importing = peak_of("import", str(model), str(run))
        exporting = peak_of("export", str(run), str(back))
        print(f"{SHAPE.num_params():,} parameters: import {importing / 1e6:.0f} MB, export {exporting / 1e6:.0f} MB")
        assert importing < SHARD + LAYER
        assert exporting < SHARD + LAYER
        first, again = open_model(model), open_model(back)
        for name in ("embed_tokens.weight", "lm_head.weight", "layers.7.moe.experts.w2.31"):
            assert torch.equal(first.read(name), again.read(name)), name
    finally:
        for folder in (model, run, back):
            shutil.rmtree(folder, ignore_errors=True)
