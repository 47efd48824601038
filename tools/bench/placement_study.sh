#!/usr/bin/env bash
# Train a model to judge expert placements on, and write its routing statistics on training and held-out text.
#   tools/bench/placement_study.sh TEXT.jsonl.xz WORK OUTPUT [path=value ...]
# TEXT is made by tools/bench/mixed_text.py. WORK takes the corpus and the run, OUTPUT the small results. One H100 needs
# about ten minutes; stopped, the same command goes on. TRAIN_SECONDS ends training early, saved. On a CPU give sizes,
# such as train.steps=4 model.hidden_size=32, and PROFILE_TOKENS.
set -euo pipefail
text=$1 work=$2 output=$3
shift 3
train_seconds=${TRAIN_SECONDS:-330} profile_tokens=${PROFILE_TOKENS:-3000000} vocabulary=${VOCABULARY:-16384}
python=${PYTHON:-python3}
mkdir -p "$work" "$output"

if [ ! -f "$work/corpus/corpus.json" ]; then
  "$python" -c 'import lzma, shutil, sys
with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(packed, out)' "$text" "$work/mixed.jsonl"
  time "$python" -m occult_train.launcher.cli prepare "$work/mixed.jsonl" --output "$work/corpus" \
    --vocab-size "$vocabulary" --valid-fraction 0.1
fi

# `timeout` says 124 though the run has saved and ended well
time timeout -s TERM "$train_seconds" "$python" -m occult_train.train configs/placement_study.yaml \
  "data.path=$work/corpus" "output=$work/run" "$@" || [ $? -eq 124 ]
cp "$work/run/log.jsonl" "$work/run/config.yaml" "$output"

for part in valid train; do
  time "$python" -m occult_train.launcher.cli profile "$work/run" --part "$part" --tokens "$profile_tokens" \
    --sample 50000 --output "$output/statistics-$part.safetensors"
done

# Speed while routing was counted, and in as many steps before and after
"$python" - "$output/log.jsonl" "$output/config.yaml" <<'PYTHON'
import statistics
import sys
from pathlib import Path

from occult_train import config, runlog

wanted = config.load([sys.argv[2]]).moe.statistics
steps = [r for r in runlog.read(Path(sys.argv[1])) if r["kind"] == "step" and r["step"] > 1]
end = wanted.start + wanted.steps
inside = [r["tokens_per_second"] for r in steps if wanted.start < r["step"] <= end]
around = [r["tokens_per_second"] for r in steps if r["step"] not in range(wanted.start + 1, end + 1)
          and wanted.start - wanted.steps < r["step"] <= end + wanted.steps]
if inside and around:
    with_it, without = statistics.median(inside), statistics.median(around)
    print(f"tokens/s: {with_it:,.0f} counting, {without:,.0f} not ({1 - with_it / without:.2%} slower)")
PYTHON
ls -l "$output"
