#!/usr/bin/env bash
# Stages of a session on a GPU machine, without a network; each ends when its time is up
# (README.md says what they are expected to take; SECONDS_A_STAGE gives another limit):
#   benchmarks/on_gpu.sh build                     the package as a user installs it, with its extension for
#                                                  this GPU
#   benchmarks/on_gpu.sh test [PYTEST ARGUMENTS]   correctness: everything marked gpu, skips forbidden;
#                                                  in WORKERS processes (12, 0: none) with pytest-xdist
#   benchmarks/on_gpu.sh sanitize                  compute-sanitizer on the kernels at small shapes, those
#                                                  of csrc too
#   benchmarks/on_gpu.sh ceilings                  what this GPU can do at most: bandwidths, products, exp2,
#                                                  launches, and the SM clock during each -> ceilings.json
#   benchmarks/on_gpu.sh kernels                   time of every launch of a call -> kernels.json
#   benchmarks/on_gpu.sh ncu [SHAPE LOSS PASS ...] hardware counters of single launches -> ncu.csv, ncu.txt
#                                                  (dq and dk of internvl3-1b-from-8b/full-8192 mse)
#   benchmarks/on_gpu.sh loss MODEL KIND           the loss at a model pair's shapes
#                                                  (internvl3-1b, internvl3-2b, qwen2.5-vl-3b; t2v, full)
#   benchmarks/on_gpu.sh gram                      gradient projection
#   benchmarks/on_gpu.sh step                      whole multi-teacher steps, InternVL3-1B from 8B
#   benchmarks/on_gpu.sh demo DATA [ARGUMENTS]     the demo (demo_gpu.py) on a data set made before
# Results go to ${OUT:-benchmarks/results/gpu}; the raw rounds are in the JSON files, also those of a
# stage that ran out of time: NAME.jsonl stays where NAME.json could not be written. DRIVEKD_DRY=1
# goes through a stage on the CPU at toy shapes: its numbers mean nothing. Needs torch, triton,
# transformers, numpy, pytest, pytest-benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?which stage? see the head of this file}
shift
case $stage in
  test | sanitize | ceilings | kernels | ncu | loss | gram | step | build | demo) ;;
  *)
    echo "no stage '$stage'; see the head of this file" >&2
    exit 2
    ;;
esac
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
PYTHON=${PYTHON:-python3}
case "$stage ${2:-}" in # a third more than what they are expected to take
  "loss t2v") limit=35 ;;
  "loss "*) limit=100 ;;
  gram*) limit=80 ;;
  step*) limit=120 ;;
  ceilings*) limit=45 ;;
  kernels*) limit=100 ;;
  ncu*) limit=160 ;;
  *) limit=460 ;;
esac
SECONDS_A_STAGE=${SECONDS_A_STAGE:-$limit}
deadline=$((SECONDS + SECONDS_A_STAGE))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # tests ask for deterministic algorithms
dry=${DRIVEKD_DRY:-0}
case $stage in ceilings | kernels | ncu) export TRITON_INTERPRET=0 ;; esac # dry runs record launches

within() { # the command, interrupted when the stage's time is over, so that pytest still writes
  timeout --signal=INT --kill-after=15 "$((deadline > SECONDS ? deadline - SECONDS : 1))" "$@"
}
# Not the settings of pyproject.toml that need plug-ins which may be missing here.
tests() {
  within "$PYTHON" -m pytest -q -ra -o addopts= --strict-markers -p no:cacheprovider \
    -W ignore::pytest.PytestConfigWarning "$@"
}
bench() { # also writes machine.json; each measurement at once, and all of them at the end
  local name=$1 failed=0
  shift
  rm -f "$out/$name.jsonl"
  DRIVEKD_MACHINE="$out/machine.json" DRIVEKD_ROUNDS="$out/$name.jsonl" \
    tests -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning \
    --benchmark-json="$out/$name.json" "$@" | tee "$out/$name.txt" || failed=$?
  if [ -s "$out/$name.json" ]; then rm -f "$out/$name.jsonl"; else rm -f "$out/$name.json"; fi
  return "$failed"
}

has_cuda_kernels() {
  "$PYTHON" -c 'import torch, drivekd._C; torch.ops.drivekd_native.cuda_version' 2>/dev/null
}
install() { # for this machine's GPU alone, or compiling takes three times as long
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')} DRIVEKD_BUILD=1 \
    within "$PYTHON" -m pip install --editable . --no-build-isolation --no-deps 2>&1 | tee "$out/build.txt"
}

case $stage in
  loss | gram | step | build | demo) ;; # their benchmarks write it themselves
  *) "$PYTHON" -c "from pathlib import Path; from benchmarks.gpu import write_machine; write_machine(Path('$out/machine.json'))" ;;
esac
case $stage in
  test | sanitize)
    [ "$dry" = 1 ] || has_cuda_kernels || install ||
      echo "the extension does not build here with CUDA: its kernels are NOT covered, their tests will fail"
    ;;
esac

case $stage in
  test)
    # What the trainer needs beside is no matter here.
    "$PYTHON" -m drivekd doctor | tee "$out/doctor.txt" || echo "going on: the stages need the packages named in this file's head only"
    marked=(-m gpu)
    [ "$dry" = 1 ] && marked=(-k "test_triton_contracts")
    # Compiling kernels, some thousand seconds of one core, is what takes the time.
    workers=${WORKERS:-$((dry ? 2 : 12))}
    if [ "$workers" != 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
      marked+=(-n "$workers")
      export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    fi
    # What only a GPU can show comes first.
    first=(tests/kernels/test_triton_gpu.py tests/kernels/test_triton_gradient_gpu.py
      tests/kernels/test_projector_on_device.py tests/kernels)
    mapfile -t elsewhere < <(grep -rl --include=test_*.py mark.gpu tests/unit tests/integration)
    first+=("${elsewhere[@]}")
    DRIVEKD_REQUIRE_GPU=$((1 - dry)) tests "${marked[@]}" --benchmark-disable --durations=15 \
      "${@:-${first[@]}}" | tee "$out/test.txt"
    ;;
  sanitize)
    names="odd_lengths or padding or random_absences or unaligned or small_ragged"
    checked=(tests/kernels/test_triton_attention.py tests/kernels/test_triton_gradient_gpu.py tests/kernels/test_native_gradient_gpu.py)
    if [ "$dry" = 1 ]; then
      tests --collect-only "${checked[@]}" -k "$names" | tee "$out/sanitize.txt"
      exit
    fi
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on this machine" >&2; exit 3; }
    failed=0
    whole=$deadline
    for tool in memcheck racecheck; do
      [ $tool = racecheck ] || deadline=$(((SECONDS + whole) / 2))
      # Without torch's own cache of memory every tensor ends where its allocation ends.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 within compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest -q -o addopts= -p no:cacheprovider -W ignore::pytest.PytestConfigWarning \
        -m gpu "${checked[@]}" -k "$names" | tee "$out/$tool.txt" || failed=1
      deadline=$whole
    done
    exit $failed
    ;;
  ceilings)
    within "$PYTHON" -m benchmarks.ceilings "$out/ceilings.json" | tee "$out/ceilings.txt"
    ;;
  kernels)
    [ "$dry" = 1 ] || within "$PYTHON" -m benchmarks.warm || echo "going on: what did not compile ahead is compiled later"
    within "$PYTHON" -m benchmarks.kernel_times "$out/kernels.json" | tee "$out/kernels.txt"
    ;;
  ncu)
    [ $# -gt 0 ] || set -- internvl3-1b-from-8b/full-8192 mse dq dk
    profiled=("$PYTHON" -m benchmarks.counters run "$out" "$@")
    if [ "$dry" = 1 ]; then
      within "${profiled[@]}"
      exit
    fi
    command -v ncu >/dev/null || { echo "ncu (Nsight Compute) is not on this machine" >&2; exit 3; }
    report=$(mktemp -d)
    sections=()
    for name in SpeedOfLight ComputeWorkloadAnalysis 'regex:MemoryWorkloadAnalysis.*' LaunchStats Occupancy SchedulerStats WarpStateStats; do
      sections+=(--section "$name")
    done
    within ncu --clock-control none --profile-from-start off --target-processes all \
      "${sections[@]}" --export "$report/ncu" "${profiled[@]}"
    ncu --import "$report/ncu.ncu-rep" --page raw --csv --print-units base >"$out/ncu.csv"
    ncu --import "$report/ncu.ncu-rep" --page details >"$out/ncu.txt"
    rm -r "$report"
    "$PYTHON" -m benchmarks.counters table "$out" | tee "$out/ncu.md"
    ;;
  loss)
    model=${1:?which model pair?}
    kind=${2:?t2v or full?}
    bench "loss-$model-$kind" benchmarks/bench_attention_map_loss_gpu.py -k "$model and $kind"
    ;;
  gram)
    bench gram benchmarks/bench_gradient_gram_gpu.py benchmarks/bench_gradient_gram.py \
      -k "bench_gradient_gram_gpu or (bfloat16 and not public)"
    ;;
  step)
    bench step benchmarks/bench_step_gpu.py
    ;;
  build)
    install
    "$PYTHON" -m drivekd doctor | tee "$out/doctor.txt"
    ;;
  demo) # limits its own time
    "$PYTHON" -m benchmarks.demo_gpu "${1:-${DEMO_DATA:?which data set?}}" --output "$out" "${@:2}"
    ;;
esac
