#!/usr/bin/env bash
# What pruning costs in quality: a base model, then fine-tunes of it on another kind of text, each way and seed.
#   tools/bench/pruning_study.sh CORPORA.tar.xz WORK OUTPUT base [path=value ...]
#   tools/bench/pruning_study.sh CORPORA.tar.xz WORK OUTPUT tune [path=value ...]
# CORPORA is made by tools/bench/pruning_corpora.sh. WORK keeps the base model and the runs made so far, OUTPUT takes the
# small results. On an H100 `base` needs about four minutes (105 M tokens: five passes over the prose) and `tune` about
# ten; GPUS=2 shares both among two. Each ends by itself before CALL_SECONDS (540), saved, and the same command goes on.
# Both must be of one stay: the base is too large to carry, and runs of another base are refused. On a CPU give sizes,
# such as train.steps=4.
set -euo pipefail
corpora=$1 work=$2 output=$3 stage=$4
shift 4
seconds=${CALL_SECONDS:-540} python=${PYTHON:-python3} gpus=${GPUS:-1}
mkdir -p "$work" "$output"
if [ ! -f "$work/corpora/code/corpus.json" ]; then
  time "$python" -m tarfile -e "$corpora" "$work"
fi

case $stage in
base)
  # `timeout` says 124 though the run has saved and ended well
  time timeout -s TERM "$seconds" "$python" -m occult_train.launcher.cli train configs/placement_study.yaml \
    --num-gpus "$gpus" train.micro_batch_size=$((64 / gpus)) "data.path=$work/corpora/prose" "output=$work/base" \
    moe.statistics.steps=0 train.steps=1600 "$@" || [ $? -eq 124 ]
  cp "$work/base/log.jsonl" "$work/base/config.yaml" "$output"
  ;;
tune)
  tune() {
    "$python" -m occult_train.tools.bench.pruning_tune "$work/base" "$work/corpora/code" "$work/runs$1.csv" \
      --seconds "$seconds" --share "$1/$gpus" train.steps=500 optimizer.lr=3.0e-4 train.micro_batch_size=32 \
      eval.sequences=1024 train.activation_checkpointing=none moe.matmul=mixed "${@:2}"
  }
  started=()
  for share in $(seq "$gpus"); do
    CUDA_VISIBLE_DEVICES=$((share - 1)) tune "$share" "$@" &
    started+=($!)
  done
  for process in "${started[@]}"; do wait "$process"; done
  if compgen -G "$work/runs*.csv" >/dev/null; then
    "$python" -m occult_train.tools.bench.pruning_report "$work"/runs*.csv | tee "$output/table.md"
    cp "$work"/runs*.csv "$output"
  fi
  ;;
*)
  echo "the fourth argument is base or tune, not $stage" >&2
  exit 2
  ;;
esac
