#!/usr/bin/env bash
# Stages of a session on a GPU machine, each of at most 8 minutes, without a network:
#   benchmarks/on_gpu.sh test [PYTEST ARGUMENTS]   correctness: everything marked gpu, skips forbidden;
#                                              in WORKERS processes (12, 0: none) with pytest-xdist
#   benchmarks/on_gpu.sh sanitize                  compute-sanitizer on the kernels at small shapes
#   benchmarks/on_gpu.sh loss MODEL KIND           the loss at a model pair's shapes
#                                                  (internvl3-1b, internvl3-2b, qwen2.5-vl-3b; t2v, full)
#   benchmarks/on_gpu.sh gram                      gradient projection
# Results go to ${OUT:-benchmarks/results/gpu}; the raw rounds are in the JSON files, also those of a
# stage that ran out of time. DRIVEKD_DRY=1 goes through a stage on the CPU at toy shapes: its
# numbers mean nothing. Needs torch, triton, transformers, numpy, pytest, pytest-benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?which stage? see the head of this file}
shift
case $stage in
  test | sanitize | loss | gram) ;;
  *)
    echo "no stage '$stage'; see the head of this file" >&2
    exit 2
    ;;
esac
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
PYTHON=${PYTHON:-python3}
SECONDS_A_STAGE=${SECONDS_A_STAGE:-460}
deadline=$((SECONDS + SECONDS_A_STAGE))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # tests ask for deterministic algorithms
dry=${DRIVEKD_DRY:-0}

within() { # the command, interrupted when the stage's time is over, so that pytest still writes
  timeout --signal=INT --kill-after=15 "$((deadline > SECONDS ? deadline - SECONDS : 1))" "$@"
}
# Not the settings of pyproject.toml that need plug-ins which may be missing here.
tests() {
  within "$PYTHON" -m pytest -q -ra -o addopts= --strict-markers -p no:cacheprovider \
    -W ignore::pytest.PytestConfigWarning "$@"
}
bench() {
  local name=$1
  shift
  tests -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning \
    --benchmark-json="$out/$name.json" "$@" | tee "$out/$name.txt"
}

if [ "$dry" != 1 ] && { [ "$stage" = gram ] || [ "$stage" = test ]; } &&
  ! "$PYTHON" -c 'import torch, drivekd._C; torch.ops.drivekd_native.cuda_version' 2>/dev/null; then
  # For this machine's GPU alone, or it takes three times as long.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')} DRIVEKD_BUILD=1 \
    within "$PYTHON" setup.py -q build_ext --inplace ||
    echo "the extension does not build here with CUDA: its tests will fail"
fi
# What the trainer needs beside is no matter here.
"$PYTHON" -m drivekd doctor | tee "$out/doctor.txt" || echo "going on: the stages need the packages named in this file's head only"
"$PYTHON" -c "from pathlib import Path; from benchmarks.gpu import write_machine; write_machine(Path('$out/machine.json'))"

case $stage in
  test)
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
    DRIVEKD_REQUIRE_GPU=$((1 - dry)) tests "${marked[@]}" --benchmark-disable --durations=15 \
      "${@:-${first[@]}}" | tee "$out/test.txt"
    ;;
  sanitize)
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on this machine" >&2; exit 3; }
    for tool in memcheck racecheck; do
      within compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$PYTHON" -m pytest -q -o addopts= -p no:cacheprovider -W ignore::pytest.PytestConfigWarning \
        -m gpu tests/kernels/test_triton_attention.py tests/kernels/test_triton_gradient_gpu.py -k "odd_lengths or padding or random_absences or unaligned" | tee "$out/$tool.txt"
    done
    ;;
  loss)
    model=${1:?which model pair?}
    kind=${2:?t2v or full?}
    bench "loss-$model-$kind" benchmarks/bench_attention_map_loss_gpu.py -k "$model and $kind"
    ;;
  gram)
    bench gram benchmarks/bench_gradient_gram.py benchmarks/bench_gradient_gram_gpu.py
    ;;
esac
