#!/usr/bin/env bash
# Minutes on a bare GPU machine: is the CUDA backend right there, clean under the sanitizers, and how far from the card's
# ceilings? Nothing is installed and nothing downloaded; it needs torch, numpy, einops, jaxtyping and pytest.
#
#   OUT=FOLDER bash benchmarks/gpu_run.sh               on the GPU, in the repository's root; under 9 minutes
#   OUT=FOLDER DEVICE=cpu bash benchmarks/gpu_run.sh    a rehearsal: NVRTC's PTX on the host takes the GPU's place, tiny
#
# FOLDER receives run.log, steps.json (exit and seconds of each step), environment.json, smoke.json, tests.xml, timing.json
# and ncu.csv. Steps come in the order in which they make the next ones pointless.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-./gpu_run_out}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
[ "$DEVICE" = cuda ] && slower=1 || slower=5 # a rehearsal compiles the translated kernels first
LIMIT=${LIMIT:-$((530 * slower))}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 DEVICE OUT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec > >(tee "$OUT/run.log") 2>&1
echo '{}' >"$OUT/steps.json"

record() { # name, exit, seconds
  "$PYTHON" - "$OUT/steps.json" "$@" <<'PY'
import json, sys

path, name, code, seconds = sys.argv[1:]
steps = json.load(open(path))
steps[name] = {"exit": int(code), "seconds": int(seconds)}
json.dump(steps, open(path, "w"), indent=1)
PY
}

step() { # name, most seconds, command...; exit 124: its time ran out, 125: there was none left
  local name=$1 most=$(($2 * slower)) left=$((LIMIT - SECONDS)) began=$SECONDS code
  shift 2
  [ "$most" -gt "$left" ] && most=$left
  if [ "$most" -lt 10 ]; then
    echo "== $name: left out, $left s are left"
    record "$name" 125 0
    return 125
  fi
  echo "== $name, at $began s, at most $most s"
  timeout -k 5 "$most" "$@"
  code=$?
  record "$name" $code $((SECONDS - began))
  echo "== $name: exit $code after $((SECONDS - began)) s"
  return $code
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv 2>/dev/null

if ! step environment 90 "$PYTHON" -m benchmarks.gpu_smoke environment; then
  echo "== the kernels do not load here; environment.json says why"
  exit 1
fi
step smoke 100 "$PYTHON" -m benchmarks.gpu_smoke checks
code=$?
if [ $code -eq 124 ] || [ $code -ge 128 ]; then # it hangs or dies: find out where, and nothing else
  step memcheck 120 compute-sanitizer --tool memcheck --print-limit 20 "$PYTHON" -m benchmarks.gpu_smoke launches
  CUDA_LAUNCH_BLOCKING=1 step blocking 60 "$PYTHON" -m benchmarks.gpu_smoke launches
  exit 1
fi
if [ "$DEVICE" = cuda ]; then
  step tests 160 "$PYTHON" -m pytest -c /dev/null --rootdir=. --noconftest tests/kernels -k device -q \
    --maxfail=25 -p no:cacheprovider --junitxml="$OUT/tests.xml"
  step timing 200 "$PYTHON" -m benchmarks.gpu_timing
  for tool in memcheck racecheck initcheck synccheck; do
    # without torch's caching allocator every tensor has borders of its own
    SHORT=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 50 \
      compute-sanitizer --tool "$tool" --print-limit 10 --error-exitcode 1 "$PYTHON" -m benchmarks.gpu_smoke launches
  done
  sections=()
  for name in SpeedOfLight Occupancy LaunchStats WarpStateStats ComputeWorkloadAnalysis MemoryWorkloadAnalysis SchedulerStats; do
    sections+=(--section "$name")
  done
  step profile 80 ncu --clock-control none --profile-from-start off "${sections[@]}" -k 'regex:selective_scan|attention_' \
    --csv --page raw --log-file "$OUT/ncu.csv" "$PYTHON" -m benchmarks.gpu_timing profile
else
  step tests 160 "$PYTHON" -m pytest -c /dev/null --rootdir=. --noconftest tests/kernels/test_switches.py -q \
    -p no:cacheprovider --junitxml="$OUT/tests.xml"
  step timing 200 "$PYTHON" -m benchmarks.gpu_timing
  SHORT=1 step launches 60 "$PYTHON" -m benchmarks.gpu_smoke launches
fi
echo "== done after $SECONDS s"
cat "$OUT/steps.json"
