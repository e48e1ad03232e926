#!/usr/bin/env bash
# All there is to know on a machine with a GPU, in one call and without a network: torch 2.11 or newer, nvcc and pytest are there. Parts, in
# this order, or those that are named: build test sanitize bench train. Each has a limit of time; together they end within 9 minutes.
#
#   bench/on_gpu.sh                 results in bench/results/<machine>.json
#   bench/on_gpu.sh build sanitize
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD
export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
failed=""

# part NAME SECONDS COMMAND...: runs it, says how long it took, goes on after a failure.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" || status=$?
  echo "== $name: $((SECONDS - start)) s, exit status $status$([ $status = 124 ] && echo ", stopped after its $limit s")"
  [ $status = 0 ] || failed="$failed $name"
}

machine() {
  $PYTHON -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())'
}

build() {
  part build 180 env FORCE_CUDA=1 $PYTHON setup.py -q build_ext --inplace
  $PYTHON -m gradkernels info
}

test_() {
  part "test on a GPU" 40 $PYTHON -m pytest -q tests/test_on_gpu.py
  part "test suite" 80 $PYTHON -m pytest -q -x --maxfail=20 -k cuda tests/test_activation.py tests/test_batch_norm_act.py \
    tests/test_clip_grad.py tests/test_optim.py
}

sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== sanitize: skipped, there is no compute-sanitizer in PATH"
    return
  fi
  local short="test_activation or test_learnt_parameter or test_clipping"
  for tool in memcheck racecheck initcheck synccheck; do
    part "sanitize with $tool" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      $PYTHON -m pytest -q tests/test_on_gpu.py -k "($short) and float32 or test_clipping"
  done
}

bench() {
  mkdir -p bench/results
  part bench 120 $PYTHON bench/bench_cuda.py --compile --json "bench/results/$(machine).json"
}

train() {
  part train 60 $PYTHON bench/train_on_gpu.py
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.memory --format=csv,noheader || {
  echo "on_gpu.sh: there is no GPU here"
  exit 1
}
for name in "${@:-build test sanitize bench train}"; do
  for each in $name; do
    case $each in
      test) test_ ;;
      build | sanitize | bench | train) "$each" ;;
      *) echo "on_gpu.sh: no part $each; there are build test sanitize bench train" && exit 2 ;;
    esac
  done
done
echo "== ${SECONDS} s in all; failed:${failed:- nothing}"
[ -z "$failed" ]
