#!/usr/bin/env bash
# All that a machine with a GPU has to answer, without a network; it needs torch 2.11 or newer, nvcc, pytest and coreutils 8.31. The parts
# are build, smoke, profile (each kernel by itself), test, bench (calls and training steps), suite and sanitize; without arguments the
# first four, which decide most. A part has a limit of time, and a call ends within $ENDS seconds, 330 unless it is set; a part that is
# stopped or left out counts as failed. Nothing runs after a failed build.
#
#   bench/on_gpu.sh                               results in bench/results/<GPU>*, and in the folder $OUT where it is set
#   bench/on_gpu.sh bench sanitize suite          with what an earlier call has built
set -u
cd "$(dirname "$0")/.." || exit
readonly PARTS="build smoke profile test bench suite sanitize"
# Of a call, in seconds: a part that is stopped has 20 more to report.
readonly ENDS=${ENDS:-330}
[[ $ENDS =~ ^[0-9]+$ ]] || { echo "on_gpu.sh: ENDS is a number of seconds, not $ENDS" && exit 2; }
STARTED=$(date +%s)
PYTHON=${PYTHON:-$(command -v python3 || echo python)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
# The toolkit's root, since the nvcc in PATH may be a wrapper elsewhere; compute-sanitizer is next to the real one.
CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')}
[ -z "$CUDA_HOME" ] || export CUDA_HOME PATH=$PATH:$CUDA_HOME/bin
failed=""

# part NAME SECONDS COMMAND...: runs it, prints how long it took, copies the results; the next part runs after a failure too.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  [ "$limit" -le $((ENDS - SECONDS)) ] || limit=$((ENDS - SECONDS))
  if [ "$limit" -le 0 ]; then
    echo "== $name: left out for lack of time"
    failed="$failed $name,"
    return 1
  fi
  # By SIGINT, as Ctrl-C: pytest then names its failures and the benchmark makes its table. A shell ignores it in background commands.
  timeout --signal=INT --kill-after=${KILL_AFTER:-20} "$limit" env --default-signal=INT "$@" || status=$?
  echo "== $name: $((SECONDS - start)) s, exit status $status$([ $((SECONDS - start)) -lt "$limit" ] || echo ", stopped after $limit s")"
  [ -z "${OUT:-}" ] || find bench/results build/on_gpu -type f -newermt "@$STARTED" -exec cp -t "$OUT" {} +
  [ $status = 0 ] || failed="$failed $name,"
  return $status
}

# The other parts need what this one makes.
build() {
  "$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.partition(".")[0]) < 77)' \
    || echo "== build: setuptools below 77 refuses the license of pyproject.toml: pip install 'setuptools>=77'"
  part build 150 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architectures}" "$PYTHON" setup.py -q build_ext --inplace \
    || exit 1
  part "what was built" 60 "$PYTHON" -m gradkernels info
}

sanitize() {
  local tool only
  command -v compute-sanitizer > /dev/null || { echo "== sanitize: skipped, compute-sanitizer is not in PATH" && return; }
  for tool in memcheck racecheck synccheck initcheck; do
    # Initcheck has to see what torch's kernels write.
    only=(--kernel-name kns=gradkernels)
    [ $tool != initcheck ] || only=()
    # torch asks the driver for functions that it may lack, which is not an error.
    part "sanitize with $tool" 125 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      --report-api-errors no "${only[@]}" "$PYTHON" -m pytest -q tests/test_on_gpu.py -k test_a_little_of_everything
  done
}

[ $# -gt 0 ] || set -- build smoke profile test
for name in "$@"; do
  [[ " $PARTS " == *" $name "* ]] || { echo "on_gpu.sh: there is no part $name; the parts are $PARTS" && exit 2; }
done
mkdir -p build/on_gpu
nvidia-smi --query-gpu=name,driver_version,clocks.max.memory --format=csv,noheader || { echo "on_gpu.sh: there is no GPU here" && exit 1; }
# Without one, the tests would be skipped, and pass.
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "on_gpu.sh: torch finds no GPU" && exit 1; }
architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')
for name in "$@"; do
  case $name in
    # Tests that are skipped show nothing.
    smoke) part smoke 60 bash -c 'set -o pipefail; "$@" | tee build/on_gpu/smoke.log && ! grep -q " skipped" build/on_gpu/smoke.log' - \
      "$PYTHON" -m pytest -q -rfE tests/test_on_gpu.py -k "a_little or two_passes or waits or replays" ;;
    profile) part profile 150 "$PYTHON" bench/profile_cuda.py --seconds 120 --out build/on_gpu/profile.json ;;
    test) part "test on a GPU" 150 "$PYTHON" -m pytest -q -rfE --junitxml=build/on_gpu/tests.xml tests/test_on_gpu.py ;;
    bench) part bench 270 "$PYTHON" bench/suite.py --only cuda --out bench/results ;;
    suite) part "test suite" 300 "$PYTHON" -m pytest -q -rfE --tb=line $("$PYTHON" -c 'import xdist; print("-n 8")' 2> /dev/null) \
      -k cuda tests/test_activation*.py tests/test_rrelu.py tests/test_batch_norm_act.py tests/test_group_norm_act.py tests/test_clip_grad.py tests/test_optim.py ;;
    *) "$name" ;;
  esac
done
failed=${failed%,}
echo "== ${SECONDS} s in all; failed:${failed:- nothing}"
[ -z "$failed" ]
