#!/usr/bin/env bash
# All there is to know on a machine with a GPU, without a network: torch 2.11 or newer, nvcc, pytest and coreutils 8.31 are there. Parts, in
# the order in which they are named; build test bench train suite where none is. sanitize takes as long as all of these, and is run when
# it is named. Each part has a limit of time, and a call ends within 9 minutes: what does not fit is stopped or left out, and counts as
# failed.
#
#   bench/on_gpu.sh                 results in bench/results/<GPU>.json, .md and .png, and in the folder $OUT where that is set
#   bench/on_gpu.sh sanitize        with what an earlier call has built
set -u
cd "$(dirname "$0")/.." || exit
readonly PARTS="build test bench train suite sanitize"
# Of a call, in seconds: a part that is stopped has 20 more to say what it found.
readonly ENDS=510
STARTED=$(date +%s)
# Where there is python3, there may be no python.
PYTHON=${PYTHON:-$(command -v python3 || echo python)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# What is stopped has said all that it had to say.
export PYTHONUNBUFFERED=1
export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
# The toolkit's root, since the nvcc in PATH may be a wrapper that stands elsewhere. compute-sanitizer stands beside the real one.
CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')}
if [ -n "$CUDA_HOME" ]; then
  export CUDA_HOME PATH=$PATH:$CUDA_HOME/bin
fi
failed=""

# part NAME SECONDS COMMAND...: runs it, says how long it took, goes on after a failure.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  [ "$limit" -le $((ENDS - SECONDS)) ] || limit=$((ENDS - SECONDS))
  if [ "$limit" -le 0 ]; then
    echo "== $name: left out for want of time"
    failed="$failed $name,"
    return
  fi
  # As by Ctrl-C, upon which pytest names its failures and the benchmark makes its table; where this runs in the background, a shell has it
  # ignored.
  timeout --signal=INT --kill-after=20 "$limit" env --default-signal=INT "$@" || status=$?
  echo "== $name: $((SECONDS - start)) s, exit status $status$([ $((SECONDS - start)) -lt "$limit" ] || echo ", stopped after $limit s")"
  [ $status = 0 ] || failed="$failed $name,"
}

build() {
  local package
  for package in setuptools ninja torch; do
    echo "== build: $package $("$PYTHON" -c "from importlib.metadata import version; print(version('$package'))" 2> /dev/null || echo "is not installed")"
  done
  "$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.partition(".")[0]) < 77)' \
    || echo "== build: setuptools below 77 refuses the license of pyproject.toml: pip install 'setuptools>=77'"
  "$PYTHON" -c 'import ninja' 2> /dev/null || command -v ninja > /dev/null || echo "== build: there is no ninja, files are compiled one by one"
  part build 220 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architectures}" "$PYTHON" setup.py -q build_ext --inplace
  part "what was built" 60 "$PYTHON" -m gradkernels info
}

test_() {
  part "test on a GPU" 150 "$PYTHON" -m pytest -q -rfE tests/test_on_gpu.py
}

suite() {
  local workers=()
  ! "$PYTHON" -c 'import xdist' 2> /dev/null || workers=(-n 8)
  part "test suite" 300 "$PYTHON" -m pytest -q -rfE --tb=line "${workers[@]}" -k cuda tests/test_activation.py \
    tests/test_batch_norm_act.py tests/test_clip_grad.py tests/test_optim.py
}

sanitize() {
  local tool only
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== sanitize: skipped, there is no compute-sanitizer in PATH"
    return
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    only=(--kernel-name kns=gradkernels)
    # What torch's kernels write is initialized.
    [ $tool != initcheck ] || only=()
    # torch asks the driver for what it may lack, which is no error.
    part "sanitize with $tool" 125 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      --report-api-errors no "${only[@]}" "$PYTHON" -m pytest -q tests/test_on_gpu.py -k test_a_little_of_everything
  done
}

bench() {
  part bench 200 "$PYTHON" bench/suite.py --only cuda --out bench/results
}

train() {
  part train 80 "$PYTHON" bench/train_on_gpu.py
}

# What this call wrote.
copy_results() {
  [ -z "${OUT:-}" ] || find bench/results -type f -newermt "@$STARTED" -exec cp -t "$OUT" {} +
}

for name in "$@"; do
  case " $PARTS " in
    *" $name "*) ;;
    *) echo "on_gpu.sh: no part $name; there are $PARTS" && exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,driver_version,clocks.max.memory --format=csv,noheader || {
  echo "on_gpu.sh: there is no GPU here"
  exit 1
}
architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')
trap copy_results EXIT
[ $# -gt 0 ] || set -- build test bench train suite
for name in "$@"; do
  case $name in
    test) test_ ;;
    *) "$name" ;;
  esac
done
failed=${failed%,}
echo "== ${SECONDS} s in all; failed:${failed:- nothing}"
[ -z "$failed" ]
