#!/usr/bin/env bash
# Quality of shortcut-connected experts (scmoe_study.py) on all GPUs of a host at once: 27 runs of 50 M tokens.
#   tools/bench/scmoe_study.sh CORPUS OUTPUT [path=value ...]
# CORPUS is a folder of `occult prepare`, or one packed as .tar.xz. OUTPUT takes the runs, a CSV for each process, their
# logs and the table. PER_GPU (2) processes share a GPU. It ends by itself before CALL_SECONDS (540), and the same
# command on as many GPUs goes on. The text (31 M tokens, 22 MB packed), where there is a network:
#   python -m occult_train.tools.bench.mixed_text text.jsonl.xz && xz -dk text.jsonl.xz
#   occult prepare text.jsonl --output corpus --vocab-size 16384 --valid-fraction 0.04 && tar cJf corpus.tar.xz corpus
set -euo pipefail
corpus=$1 output=$2
shift 2
seconds=${CALL_SECONDS:-540} per=${PER_GPU:-2} python=${PYTHON:-python3}
mkdir -p "$output"
if [ -f "$corpus" ]; then
  unpacked=$(mktemp -d)
  trap 'rm -r "$unpacked"' EXIT
  "$python" -m tarfile -e "$corpus" "$unpacked"
  corpus=$(dirname "$unpacked"/*/corpus.json)
fi
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=$(((gpus > 0 ? gpus : 1) * per)) running=()
for share in $(seq "$processes"); do
  CUDA_VISIBLE_DEVICES=$((gpus > 0 ? share % gpus : 0)) "$python" -m occult_train.tools.bench.scmoe_study \
    "$corpus" "$output/runs$share.csv" --share "$share/$processes" --seconds "$seconds" "$@" \
    >"$output/log$share.txt" 2>&1 &
  running+=($!)
done
failed=0
for process in "${running[@]}"; do wait "$process" || failed=1; done
tail -n 30 "$output"/log*.txt
"$python" -m occult_train.tools.bench.scmoe_report "$output"/runs*.csv | tee "$output/table.md"
exit $failed
