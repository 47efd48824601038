#!/usr/bin/env bash
# The layer and the trainer on all GPUs of one host (4 or 8), in pieces that end before CALL_SECONDS (540) and that can
# be repeated. How long they take is estimated from two GPUs:
#   tools/bench/scale_study.sh WORK OUTPUT train CORPUS [path=value ...]    9 minutes, twice: the same command goes on
#   tools/bench/scale_study.sh WORK OUTPUT profile [option ...]             4 minutes, behind train
#   tools/bench/scale_study.sh WORK OUTPUT layer on|off [option ...]        4 minutes each (P2P), behind profile
#   tools/bench/scale_study.sh WORK OUTPUT step on|off 1|2 [option ...]     4 minutes each (P2P, ZeRO stage)
# WORK keeps what pieces leave to each other, OUTPUT takes small results; what is behind a piece's words goes to `occult
# train`, `profile`, `bench layer` or `bench step`. On another machine `layer` needs WORK/profile, which is
# OUTPUT/profile; `step` needs nothing.
# CORPUS: a folder of `occult prepare`, or one packed as .tar.xz (scmoe_study.sh says how one is made).
#
# train: configs/placement_study.yaml (64 experts, 8 a token, 227 M parameters) with experts over all GPUs, placed anew
#   every 2,000 steps; the last rank is killed behind step KILL_STEP (2500), and the run goes on from step 2000. 10,000
#   steps of 65,536 tokens are some 20 passes over 31 M tokens: what is shown is the trainer, not a good model.
# profile: routing statistics of the trained model, placements for 4 and 8 devices judged on held-out text.
# layer: four models' layers against AutoEP. OLMoE's tokens are routed as layers 0 and 4 (LAYERS) of the trained model
#   did, also placed, and pruned to 3, 2 and 1 devices; the others, of other numbers of experts, uniformly. The 60
#   experts of Qwen1.5-MoE cannot be spread over 8 GPUs: it has 64 there. Without P2P rows travel through 64 MB of
#   /dev/shm for each ordered pair of GPUs (0.8 GB for 4, 3.8 GB for 8); where it is smaller, take
#   WAY=transport=collective,overlap=1.
# step: OLMoE-1B-7B whole (16 layers, 6.92 G parameters, 6.44 G of them in experts), random weights, accumulation 1 and
#   8. By count a rank of 4 holds 1.61 G + 0.48 G parameters: 4 GB, as much of gradients, 21 GB of optimizer states
#   (experts are not sharded further) and 7 GB of gradients in fp32: 36 GB (19 GB of 8). What came on top on two GPUs
#   was 9 to 17 GB, of AutoEP 24 to 32 GB. ZeRO-2 shards dense gradients alone, 1 GB.
# On a CPU RANKS (2) are started; give sizes, such as --shape 80,16,64,8 --tokens 64 --seconds 0.01 to layer.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '4,7p' "$0" >&2
  exit 2
fi
work=$1 output=$2 piece=$3
shift 3
seconds=${CALL_SECONDS:-540} python=${PYTHON:-python3}
occult=("$python" -m occult_train.launcher.cli)
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus > 0 ? gpus : ${RANKS:-2}))
where=(--ep "$ranks")
if [ "$gpus" -eq 0 ]; then where+=(--cpu); fi
mkdir -p "$work" "$output"

# What has not ended when the time is over is ended; rows that are there stay
limited() {
  local left=$((seconds - SECONDS))
  time timeout -s TERM "$((left > 1 ? left : 1))" "$@"
}

case $piece in
train)
  corpus=$1
  shift
  if [ -f "$corpus" ]; then
    if [ ! -d "$work/corpus" ]; then
      mkdir -p "$work/corpus.new"
      "$python" -m tarfile -e "$corpus" "$work/corpus.new"
      mv "$work/corpus.new" "$work/corpus"
    fi
    corpus=$(dirname "$work"/corpus/*/corpus.json)
  fi
  code=0
  "$python" -m occult_train.tools.bench.scale_train "$work/run" --seconds $((seconds - SECONDS - 60)) \
    --kill-at "${KILL_STEP:-2500}" configs/placement_study.yaml "data.path=$corpus" "parallel.expert=$ranks" \
    "train.micro_batch_size=$((64 / ranks))" train.steps=10000 moe.matmul=joint moe.statistics.steps=0 \
    moe.replace.interval=2000 moe.replace.window=200 checkpoint.interval=1000 eval.interval=1000 "$@" || code=$?
  "$python" -m occult_train.tools.bench.scale_report "$work/run" "$output"
  exit $code
  ;;
profile)
  mkdir -p "$work/profile"
  for part in train valid; do
    limited "${occult[@]}" profile "$work/run" --part "$part" --sample 50000 \
      --output "$work/profile/statistics-$part.safetensors" "$@"
  done
  placing=()
  for devices in $(printf '%s\n' 4 8 "$ranks" | sort -nu); do
    limited "${occult[@]}" place "$work/profile/statistics-train.safetensors" --devices "$devices" \
      --held-out "$work/profile/statistics-valid.safetensors" --output "$work/profile/placement-$devices.json" \
      >"$work/profile/place-$devices.txt" &
    placing+=($!)
  done
  for process in "${placing[@]}"; do wait "$process"; done
  grep -h '^D=.*C_T' "$work"/profile/place-*.txt
  cp -r "$work/profile" "$output"
  ;;
layer)
  p2p=$1
  shift
  if [ "$p2p" = on ]; then way=${WAY:-transport=symmetric}; else way=${WAY:-transport=host,overlap=1}; fi
  ours="ours:matmul=joint,$way" choices="$work/profile/statistics-valid.safetensors" routing=""
  for layer in ${LAYERS:-0 4}; do routing+=" chosen:$choices:$layer"; done
  if [ $((60 % ranks)) -eq 0 ]; then qwen=qwen1.5-moe; else qwen=2048,1408,64,4; fi
  placed="$ours,placement=$work/profile/placement-$ranks.json" pruned=""
  for m in 3 2 1; do if [ "$m" -lt "$ranks" ]; then pruned+=" $ours,prune=$m"; fi; done
  shared=(--p2p "$p2p" --seconds 0.3 "${where[@]}")
  failed=0
  limited "${occult[@]}" bench layer --shape olmoe --routing "$routing" --system "$ours $placed$pruned autoep" \
    --csv "$output/layer-$p2p-trained.csv" "${shared[@]}" "$@" || failed=1
  limited "${occult[@]}" bench layer --shape "deepseek-moe-16b $qwen qwen3-30b-a3b" --system "$ours$pruned autoep" \
    --csv "$output/layer-$p2p-uniform.csv" "${shared[@]}" "$@" || failed=1
  "$python" -m occult_train.tools.bench.scale_layers "$output"/layer-*.csv | tee "$output/layers.md"
  exit $failed
  ;;
step)
  p2p=$1 zero=$2
  shift 2
  limited "${occult[@]}" bench step --p2p "$p2p" --zero "$zero" --layers 16 --seconds 5 "${where[@]}" \
    --csv "$output/step-$p2p-zero$zero.csv" "$@" | tee "$output/step-$p2p-zero$zero.txt"
  ;;
*)
  echo "the third argument is train, profile, layer or step, not $piece" >&2
  exit 2
  ;;
esac
