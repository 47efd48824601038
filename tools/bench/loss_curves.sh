#!/usr/bin/env bash
# Train the same model on the same data in several ways, and compare their losses with those of the plain-torch
# deduplicating dispatcher: the fused layer, that with CUDA graphs, and plain torch sending K copies, which differs from
# it in the order of sums alone and so shows how far rounding takes two runs apart.
#   tools/bench/loss_curves.sh CORPUS WORK OUTPUT [path=value ...]
# CORPUS is a folder made by `occult prepare`. Two GPUs share the experts; on CPUs the fused layer is interpreted, so give
# sizes, such as train.steps=2 model.hidden_size=32. Writes OUTPUT/losses.csv: step, and a column for each way.
set -euo pipefail
corpus=$1 work=$2 output=$3
shift 3
python=${PYTHON:-python3}
mkdir -p "$work" "$output"
ways=(
  "reference moe.backend=reference moe.dispatcher=dedup"
  "copies moe.backend=reference moe.dispatcher=all_to_all"
  "fused moe.backend=fused moe.dispatcher=dedup"
)
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ]; then
  ways+=("graphs moe.backend=fused moe.dispatcher=dedup train.cuda_graphs=true")
fi
names=()
for way in "${ways[@]}"; do
  read -r name settings <<<"$way"
  names+=("$name")
  # shellcheck disable=SC2086
  "$python" -m occult_train.launcher.cli train configs/demo.yaml "data.path=$corpus" "output=$work/$name" $settings \
    parallel.expert=2 train.precision=bf16 checkpoint.resume=none checkpoint.interval=0 eval.interval=0 \
    eval.sequences=2 monitor.interval=1 "$@"
done
"$python" - "$work" "$output" "${names[@]}" <<'PYTHON'
import csv
import sys
from pathlib import Path

from occult_train import runlog

work, output, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
curves = {}
for name in names:
    steps = [r for r in runlog.read(work / name / "log.jsonl") if r["kind"] == "step"]
    curves[name] = {r["step"]: r["loss"] for r in steps}
right = curves["reference"]
assert right and all(curve.keys() == right.keys() for curve in curves.values()), "the runs logged different steps"
with (output / "losses.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("step", *names))
    writer.writerows((step, *(curve[step] for curve in curves.values())) for step in right)
last = max(right)
print(f"{len(right)} steps, loss {right[min(right)]:.4f} to {right[last]:.4f}; relative differences from the reference:")
for name in names[1:]:
    apart = {step: abs(loss - right[step]) / right[step] for step, loss in curves[name].items()}
    worst = max(apart, key=apart.__getitem__)
    print(f"{name}: {apart[worst]:.2e} at step {worst} at most, mean {sum(apart.values()) / len(apart):.2e}, "
          f"last {apart[last]:.2e}")
PYTHON
