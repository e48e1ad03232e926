#!/usr/bin/env bash
# All there is to know on a machine with a GPU, in one call and without a network: torch 2.11 or newer, nvcc and pytest are there. Parts, in
# this order, or those that are named: build test sanitize bench train. Each has a limit of time; together they end within 9 minutes.
#
#   bench/on_gpu.sh                 results in bench/results/<GPU>.json, .md and .png
#   bench/on_gpu.sh build sanitize
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD
export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
# compute-sanitizer stands beside nvcc.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
failed=""

# part NAME SECONDS COMMAND...: runs it, says how long it took, goes on after a failure.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" || status=$?
  echo "== $name: $((SECONDS - start)) s, exit status $status$([ $status = 124 ] && echo ", stopped after its $limit s")"
  [ $status = 0 ] || failed="$failed $name"
}

build() {
  "$PYTHON" -c 'import ninja' 2> /dev/null || command -v ninja > /dev/null || echo "== build: there is no ninja, files are compiled one by one"
  part build 130 env FORCE_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
  part "what was built" 15 "$PYTHON" -m gradkernels info
}

test_() {
  part "test on a GPU" 45 "$PYTHON" -m pytest -q tests/test_on_gpu.py
  part "test suite" 55 "$PYTHON" -m pytest -q --maxfail=20 -k cuda tests/test_activation.py tests/test_batch_norm_act.py \
    tests/test_clip_grad.py tests/test_optim.py
}

sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== sanitize: skipped, there is no compute-sanitizer in PATH"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    part "sanitize with $tool" 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/test_on_gpu.py -k test_a_little_of_everything
  done
}

bench() {
  part bench 150 "$PYTHON" -m gradkernels bench --only cuda --out bench/results
}

train() {
  part train 50 "$PYTHON" bench/train_on_gpu.py
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.memory --format=csv,noheader || {
  echo "on_gpu.sh: there is no GPU here"
  exit 1
}
[ $# -gt 0 ] || set -- build test sanitize bench train
for name in "$@"; do
  case $name in
    test) test_ ;;
    build | sanitize | bench | train) "$name" ;;
    *) echo "on_gpu.sh: no part $name; there are build test sanitize bench train" && exit 2 ;;
  esac
done
echo "== ${SECONDS} s in all; failed:${failed:- nothing}"
[ -z "$failed" ]
