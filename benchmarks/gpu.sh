#!/usr/bin/env bash
# All that only a GPU can show, on a machine that has one and this package with its dev extra installed; no weights are fetched.
#
#   bash benchmarks/gpu.sh a        # the chapters' and tests' run on CUDA
#   bash benchmarks/gpu.sh b        # SDXL's size with random weights: sampling and fine-tuning, speed and memory
#   bash benchmarks/gpu.sh c [MIN]  # go on training the embedded model and its judge for MIN minutes (8 unless told)
#   bash benchmarks/gpu.sh all
#
# Each part ends within ten minutes, whatever fails in it, and says at its end what did not pass. What it writes goes to
# OUT (runs/gpu unless told): logs, junit.xml, and the tables that belong into benchmarks/.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
failed=() ends=0

limited() {   # limited SECONDS NAME command…: at most so long and no longer than the part may last, its output in a log
  local seconds=$1 name=$2 started=$SECONDS left=$((ends - SECONDS)); shift 2
  [ "$seconds" -le "$left" ] || seconds=$left
  if [ "$seconds" -lt 20 ]; then failed+=("$name (no time left)"); return; fi
  printf '\n== %s (at most %s s)\n' "$name" "$seconds"
  timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  tail -n 5 "$OUT/$name.log"
  printf -- '-- %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - started))
  [ $code -eq 0 ] || failed+=("$name (exit $code, $OUT/$name.log)")
}

part_a() {   # chapters take CUDA by themselves where there is one; several run side by side
  ends=$((SECONDS + 570))
  limited 240 tests pytest -q -m cuda -n 4 -p no:cacheprovider --junitxml="$OUT/junit.xml"
  for part in 1_method 2_machine 3_subject 4_world 5_evidence 6_use; do limited 150 "chapters_$part" nbdev_test --path "nbs/$part" --n_workers 6; done
}

part_b() {   # in the half precision that this card computes by itself
  ends=$((SECONDS + 570))
  local half=$(python -c "from parallel_rescale.subject.defaults import half_precision; print(half_precision())")
  local dtype=$([ "$half" = bf16 ] && echo bfloat16 || echo float16)
  local sdxl="--base random-sdxl --device cuda --dtype $dtype --rank 32 --batches 1 --steps 6 --repeats 3"
  limited 120 denoiser_sdxl python benchmarks/denoiser.py $sdxl --output "$OUT/denoiser-sdxl.md"
  limited 120 picture python benchmarks/picture.py --device cuda --dtype "$dtype" --output "$OUT/picture.md"
  limited 150 denoiser_sdxl_compiled python benchmarks/denoiser.py $sdxl --compile regional --output "$OUT/denoiser-sdxl-compiled.md"
  limited 150 finetune_sdxl python benchmarks/finetune.py --size sdxl --device cuda --precision "$half" --output "$OUT/finetune-sdxl.md"
  # teach, save, load, sample, resume at full size, fp16 too; its last line tells seconds and memory
  limited 300 full_size pytest -q -s -m full_size tests/test_full_size.py -p no:cacheprovider
}

part_c() {   # goes on from the stored weights; judge and painter at the same time
  local seconds=$((${1:-8} * 60)) folder="$OUT/training"
  python training/on_gpu.py render "$folder" --seconds "$seconds" >"$OUT/render.log" 2>&1 &
  python training/on_gpu.py judge "$folder" --seconds $((seconds / 2)) >"$OUT/judge.log" 2>&1 &
  python training/on_gpu.py painter "$folder" --seconds $((seconds - 20)) >"$OUT/painter.log" 2>&1 || failed+=("painter (exit $?, $OUT/painter.log)")
  wait; tail -n 1 "$OUT"/{judge,painter}.log
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
