#!/usr/bin/env bash
# Train the same model on the same data with the fused layer and with the plain-torch dispatcher, and compare the losses.
#   tools/bench/loss_curves.sh CORPUS WORK OUTPUT [path=value ...]
# CORPUS is a folder made by `occult prepare`. Two GPUs share the experts; on CPUs the fused layer is interpreted, so give
# sizes, such as train.steps=2 model.hidden_size=32. Writes OUTPUT/losses.csv: step, fused, reference.
set -euo pipefail
corpus=$1 work=$2 output=$3
shift 3
python=${PYTHON:-python3}
mkdir -p "$work" "$output"
for backend in fused reference; do
  "$python" -m occult_train.launcher.cli train configs/demo.yaml "data.path=$corpus" "output=$work/$backend" \
    "moe.backend=$backend" moe.dispatcher=dedup parallel.expert=2 train.precision=bf16 checkpoint.resume=none \
    checkpoint.interval=0 eval.interval=0 eval.sequences=2 monitor.interval=1 "$@"
done
"$python" - "$work" "$output" <<'PYTHON'
import csv
import sys
from pathlib import Path

from occult_train import runlog

work, output = map(Path, sys.argv[1:])
curves = []
for backend in ("fused", "reference"):
    steps = [r for r in runlog.read(work / backend / "log.jsonl") if r["kind"] == "step"]
    curves.append({r["step"]: r["loss"] for r in steps})
assert curves[0].keys() == curves[1].keys() and curves[0], "the runs logged different steps"
with (output / "losses.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("step", "fused", "reference"))
    writer.writerows((step, loss, curves[1][step]) for step, loss in curves[0].items())
apart = {step: abs(loss - curves[1][step]) / curves[1][step] for step, loss in curves[0].items()}
worst = max(apart, key=apart.__getitem__)
last = max(apart)
print(f"{len(apart)} steps, loss {curves[0][min(apart)]:.4f} to {curves[0][last]:.4f}; largest relative difference "
      f"{apart[worst]:.2e} at step {worst}, mean {sum(apart.values()) / len(apart):.2e}, last {apart[last]:.2e}")
PYTHON
