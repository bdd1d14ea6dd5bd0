#!/usr/bin/env bash
# All that only a GPU can show, on a machine that has one and this package with its dev extra installed; no weights are fetched.
#
#   bash benchmarks/gpu.sh a        # the chapters' and tests' run on CUDA
#   bash benchmarks/gpu.sh b        # SDXL's size with random weights: sampling and fine-tuning, speed and memory
#   bash benchmarks/gpu.sh c [MIN]  # train the embedded model for MIN minutes (8 unless told)
#   bash benchmarks/gpu.sh all
#
# Each part ends within ten minutes, whatever fails in it, and says at its end what did not pass. What it writes goes to
# OUT (runs/gpu unless told): logs, junit.xml, and the tables that belong into benchmarks/.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
failed=()

limited() {   # limited SECONDS NAME command…: at most so long, its output in a log, its failure remembered
  local seconds=$1 name=$2 started=$SECONDS; shift 2
  printf '\n== %s (at most %s s)\n' "$name" "$seconds"
  timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  tail -n 5 "$OUT/$name.log"
  printf -- '-- %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - started))
  [ $code -eq 0 ] || failed+=("$name (exit $code, $OUT/$name.log)")
}

part_a() {
  limited 180 tests pytest -q -m cuda -p no:cacheprovider --junitxml="$OUT/junit.xml"
  # chapters take CUDA by themselves where there is one
  for chapter in 1_method/0[1-9]_* 1_method/10_focus 2_machine/0[135]_* 6_use/01_demo; do
    for file in nbs/${chapter%.ipynb}.ipynb; do
      limited 45 "chapter_$(basename "$file" .ipynb)" nbdev_test --path "$file"
    done
  done
}

part_b() {
  local python=python sdxl="--base random-sdxl --device cuda --dtype bfloat16 --rank 32"
  limited 270 denoiser_sdxl $python benchmarks/denoiser.py $sdxl --batches 1 --steps 30 --repeats 3 --output "$OUT/denoiser-sdxl.md"
  limited 270 finetune_sdxl $python benchmarks/finetune.py --size sdxl --device cuda --output "$OUT/finetune-sdxl.md"
}

part_c() {
  local minutes=${1:-8}
  # a run that was cut off goes on from its last checkpoint, so exit 124 (out of time) is what is expected here
  timeout --kill-after=20 $((minutes * 60)) parallel-rescale train-tiny "$OUT/tiny_sdxl" --recipe gpu --processes 14 >"$OUT/train_tiny.log" 2>&1
  local code=$?
  tail -n 5 "$OUT/train_tiny.log"
  [ $code -eq 0 ] || [ $code -eq 124 ] || failed+=("train-tiny (exit $code, $OUT/train_tiny.log)")
}

python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.__version__, torch.cuda.get_device_name())" || exit 2
case ${1:-all} in
  a) part_a ;;
  b) part_b ;;
  c) part_c "${2:-8}" ;;
  all) part_a; part_b; part_c "${2:-8}" ;;
  *) sed -n '2,10p' "$0"; exit 2 ;;
esac
printf '\n%s\n' "did not pass: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
