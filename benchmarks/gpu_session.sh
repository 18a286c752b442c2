#!/usr/bin/env bash
# Several stages of on_gpu.sh in one call on a GPU machine, each within its share of the time:
#   benchmarks/gpu_session.sh correctness    build, ceilings, tests, the loss of one model pair, projection
#   benchmarks/gpu_session.sh numbers        whole training steps, every kernel by itself, the other pairs
#   benchmarks/gpu_session.sh depth          counters, sanitizers, the demo (DEMO_DATA: its data set)
#   benchmarks/gpu_session.sh "gram" "loss internvl3-2b full"    stages of one's own choice
# The whole takes at most ${SECONDS_IN_ALL:-560} seconds. A stage that fails or runs out of time does not
# keep the next from running; session.txt says how each ended. Results go to ${OUT:-benchmarks/results/gpu}.
# PACK=1 leaves there one archive, results.tar.gz, for machines that hand back few files. DRIVEKD_DRY=1: see on_gpu.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
case ${1:?which session? see the head of this file} in
  # seconds at most, then the stage
  correctness) plan=("100 build" "45 ceilings" "260 test" "100 loss internvl3-1b full" "35 loss internvl3-1b t2v" "80 gram") ;;
  numbers) plan=("120 step" "100 kernels" "100 loss internvl3-2b full" "100 loss qwen2.5-vl-3b full" "35 loss internvl3-2b t2v" "35 loss qwen2.5-vl-3b t2v") ;;
  depth) plan=("100 build" "160 ncu" "140 sanitize" "210 demo") ;;
  *)
    plan=()
    for stage in "$@"; do plan+=("300 $stage"); done
    ;;
esac
target=${OUT:-benchmarks/results/gpu}
mkdir -p "$target"
export OUT=$target
[ "${PACK:-0}" = 1 ] && OUT=$(mktemp -d)
deadline=$((SECONDS + ${SECONDS_IN_ALL:-560}))

failed=0
for entry in "${plan[@]}"; do
  most=${entry%% *} stage=${entry#* } left=$((deadline - SECONDS)) began=$SECONDS
  if [ "$left" -lt 15 ]; then
    echo "$stage: left out, no time left" | tee -a "$OUT/session.txt"
    failed=1
    continue
  fi
  echo "== $stage (at most $((most < left ? most : left)) s)"
  # Words of the plan, not one argument.
  # shellcheck disable=SC2086
  SECONDS_A_STAGE=$((most < left ? most : left)) benchmarks/on_gpu.sh $stage
  code=$?
  [ "$code" = 0 ] || failed=1
  echo "$stage: exit status $code after $((SECONDS - began)) s" | tee -a "$OUT/session.txt"
done
if [ "${PACK:-0}" = 1 ]; then
  tar -C "$OUT" -czf "$target/results.tar.gz" . && rm -r "$OUT"
fi
exit $failed
