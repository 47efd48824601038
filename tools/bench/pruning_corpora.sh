#!/usr/bin/env bash
# The corpora of the pruning study, prose and code in the ids of one tokenizer, packed to be carried to a GPU:
#   tools/bench/pruning_corpora.sh WORK CORPORA.tar.xz
set -euo pipefail
work=$1 packed=$(realpath "$2") python=${PYTHON:-python3}
mkdir -p "$work"
"$python" -m occult_train.tools.bench.mixed_text "$work/prose.jsonl.xz" --code "$work/code.jsonl.xz"
xz -dkf "$work/prose.jsonl.xz" "$work/code.jsonl.xz"
occult() { "$python" -m occult_train.launcher.cli "$@"; }
occult prepare "$work/prose.jsonl" "$work/code.jsonl" --output "$work/both" --vocab-size 16384
for text in prose code; do
  occult prepare "$work/$text.jsonl" --output "$work/corpora/$text" --tokenizer "$work/both" --valid-fraction 0.1
done
tar cJf "$packed" -C "$work" corpora/prose corpora/code
ls -l "$packed"
