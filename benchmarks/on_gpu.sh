#!/usr/bin/env bash
# Stages of a session on a GPU machine, each of at most 8 minutes, without a network:
#   benchmarks/on_gpu.sh test       correctness: everything marked gpu, skips forbidden
#   benchmarks/on_gpu.sh sanitize   compute-sanitizer on the kernels at small shapes
#   benchmarks/on_gpu.sh loss MODEL the loss at a model pair's shapes (internvl3-1b, internvl3-2b, qwen2.5-vl-3b)
#   benchmarks/on_gpu.sh gram       gradient projection
# Results go to ${OUT:-benchmarks/results/gpu}; the raw rounds are in the JSON files.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?which stage? see the head of this file}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
PYTHON=${PYTHON:-python3}

"$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps
"$PYTHON" -m drivekd doctor | tee "$out/doctor.txt"
"$PYTHON" -c "from pathlib import Path; from benchmarks.gpu import write_machine; write_machine(Path('$out/machine.json'))"

bench() {
  local name=$1
  shift
  "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-json="$out/$name.json" "$@" | tee "$out/$name.txt"
}

case $stage in
  test)
    DRIVEKD_REQUIRE_GPU=1 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests | tee "$out/test.txt"
    ;;
  sanitize)
    for tool in memcheck racecheck; do
      compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/kernels -k "odd_lengths or padding or random_absences or unaligned" | tee "$out/$tool.txt"
    done
    ;;
  loss)
    bench "loss-${2:?which model pair?}" benchmarks/bench_attention_map_loss_gpu.py -k "${2}"
    ;;
  gram)
    bench gram benchmarks/bench_gradient_gram.py
    ;;
  *)
    echo "no stage '$stage'; see the head of this file" >&2
    exit 2
    ;;
esac
