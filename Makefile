# One target per task, for people, hooks and CI. The first run of a target sets up what it needs (.venv,
# torch, tools, the compiled library); later runs reuse it. TORCH is the version of torch (make test
# TORCH=2.12.0), PYTHON (3.10 or newer) the interpreter for .venv.

TORCH ?= 2.13.0
PYTHON ?= python3

export MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The file's name contains torch's version. Another version is installed and creates a new file, and the
# library is built again because it is older.
REQUIREMENTS := .venv/.requirements-$(TORCH)
DOCS_REQUIREMENTS := .venv-docs/.requirements
# For cuda-check: a second torch, with CUDA, and the root of the CUDA toolkit. The nvcc in PATH may be a
# wrapper outside of the toolkit.
CUDA_TORCH ?= 2.11.0
CUDA_ARCHITECTURES ?= 8.0;9.0;10.0+PTX
CUDA_REQUIREMENTS := .venv-cuda/.requirements-$(CUDA_TORCH)
CUDA_HOME ?= $(shell nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p')
LIBRARY := build/.library
CXX_FILES := $(shell find csrc tests torch-ext -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The oldest supported torch, TORCH, and the newest that pip lists. `make versions` adds the newest that pip
# can install.
VERSIONS = 2.11.0 $(TORCH) $(shell .venv/bin/pip index versions torch 2> /dev/null | sed -n 's/^torch (\([^+)]*\).*/\1/p')
# What tests/real_models.py, tests/test_trainers.py, tests/test_integrations.py and bench/bench_networks.py use.
LIBRARIES := torchvision timm transformers diffusers ultralytics segmentation-models-pytorch monai lightning pytorch-lightning accelerate
TRY_INSTALL := .venv/bin/pip install --quiet --dry-run --no-deps --ignore-installed
# One process for each core. tests/conftest.py divides torch's threads among them, and leaves each two at least:
# more than there are cores, so threads that wait must not keep a core. A test that hangs ends its process, which
# prints where it was, and the other tests go on.
PYTEST := OMP_WAIT_POLICY=passive .venv/bin/python -m pytest --numprocesses=$(MAX_JOBS) --dist=worksteal \
  -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
# The tests of the operators that start no processes.
OF_OPERATORS := $(addprefix tests/test_,activation*.py rrelu.py batch_norm_act.py clip_grad.py optim.py)
SANITIZED := $(OF_OPERATORS) tests/test_fuzz.py
OF_VALUES := $(OF_OPERATORS) \
  -k "test_value_and_gradient or test_far_from_zero or test_channels_last or test_clips or test_rmsprop_steps or whole_range"
# Python leaks on purpose, our code raises an error if memory cannot be allocated, and tests expect signals.
ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1:handle_segv=0
# Checks of each access to a vector are left out: with them, and with -O2, a file of kernels compiles for ten
# minutes. AddressSanitizer finds null pointers and accesses beyond an object when they happen.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr,null,object-size,pointer-overflow -fno-sanitize-address-use-after-scope
AARCH64_CXX ?= aarch64-linux-gnu-g++
# torch's headers are needed only for its thread pool.
KERNELS_FLAGS = -std=c++17 -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math -Icsrc \
  $(shell .venv/bin/python -c "import torch.utils.cpp_extension as e; print(*('-isystem' + path for path in e.include_paths()))")

# Of pyproject.toml: what a build requires, and the extras that are named.
define PRINT_REQUIREMENTS
import sys
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
lists = {"build": pyproject["build-system"]["requires"], **pyproject["project"]["optional-dependencies"]}
print(*(each for name in sys.argv[1:] for each in lists[name] if not each.startswith("gradkernels")), sep="\n")
endef
export PRINT_REQUIREMENTS

define PRINT_ADMITTED
import json, sys
print(json.load(sys.stdin)["install"][0]["metadata"]["version"].partition("+")[0])
endef
export PRINT_ADMITTED

# torch's names of this processor's other instruction sets. Only those: torch uses whatever set is requested,
# also one that the processor does not have.
define PRINT_OTHER_SETS
from gradkernels import _native
built = _native.C.build_info()["instruction_sets"]
print(*["default", "avx2"][: built.index(_native.C.instruction_set())])
endef
export PRINT_OTHER_SETS

# Such as 2.13.
define PRINT_TORCH
import torch
print(".".join(torch.__version__.split(".")[:2]))
endef
export PRINT_TORCH

.PHONY: help build wheel demo quick test test-all test-sets fuzz coverage sanitize emulate versions models lint format bench docs cuda-check cuda-check-all clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

build: $(LIBRARY)  ## compile csrc/ into gradkernels/_C and gradkernels/_portable.so

demo: $(LIBRARY)  ## experiments on vanishing and exploding gradients; writes demo*.png
	.venv/bin/python -m examples

quick: $(LIBRARY)  ## each 29th test of make test, in one minute
	$(PYTEST) --every=29

test: $(LIBRARY)  ## pytest without the slow tests
	$(PYTEST)

test-all: $(LIBRARY)  ## pytest with the slow tests, which also build an sdist and a wheel
	$(PYTEST) -m ""

test-sets: $(LIBRARY)  ## test the operators with the kernels for older processors, compared with torch's for the same processors
	set -e; sets=$$(env -u ATEN_CPU_CAPABILITY .venv/bin/python -c "$$PRINT_OTHER_SETS"); for set in $$sets; do \
	  (set -x; ATEN_CPU_CAPABILITY=$$set $(PYTEST) $(OF_VALUES)); done

fuzz: $(LIBRARY)  ## each test of tests/test_fuzz.py with 10,000 new examples (make test-all: the same 200 every time)
	.venv/bin/python -m pytest tests/test_fuzz.py -m "" --hypothesis-profile=fuzz

# The counts are atomic. Otherwise threads lose counts, down to negative ones, which gcovr refuses.
coverage: $(LIBRARY)  ## list the lines and branches of Python and the lines of C++ that make test does not reach
	CFLAGS="--coverage -fprofile-update=atomic -O1" LDFLAGS=--coverage .venv/bin/python setup.py build --build-lib build/coverage/lib --build-temp build/coverage/temp
	rm -f build/coverage/python*; find build/coverage -name '*.gcda' -delete
	.venv/bin/python -m coverage run -m pytest -o pythonpath="build/coverage/lib bench"
	ATEN_CPU_CAPABILITY=default .venv/bin/python -m coverage run -m pytest -o pythonpath=build/coverage/lib $(OF_VALUES)
	.venv/bin/python -m coverage combine --quiet
	.venv/bin/python -m coverage report
	.venv/bin/python -m gcovr --merge-lines --filter csrc/ --object-directory build/coverage/temp

sanitize: $(REQUIREMENTS)  ## run the operators' tests under ASan and UBSan, and the kernels' threads under TSan
	CFLAGS="$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -O1" \
	  .venv/bin/python setup.py build --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=$(ASAN_OPTIONS) \
	  .venv/bin/python -m pytest --capture=sys -o pythonpath=build/sanitize/lib $(SANITIZED) -m "" -k "not compile and not export and not 2_to_the_31"
	$(CXX) $(KERNELS_FLAGS) -O1 -g1 -fsanitize=thread csrc/cpu/*.cpp tests/threads/kernels.cpp -o build/sanitize/threads
	setarch -R build/sanitize/threads

# ATEN_CPU_CAPABILITY requests a set that none of these processors has. The base kernels must give the same
# bits on x86-64 and on aarch64.
emulate: $(LIBRARY)  ## run the kernels on emulated processors: without AVX2, without AVX-512, aarch64; needs qemu-user and g++ for aarch64
	@for tool in qemu-x86_64 qemu-aarch64 $(AARCH64_CXX); do command -v $$tool > /dev/null || \
	  { echo "emulate: $$tool was not found, and nothing was run (apt-get install qemu-user g++-aarch64-linux-gnu)"; exit 1; }; done
	$(CXX) $(KERNELS_FLAGS) -O1 tests/threads/kernels.cpp build/temp.*/csrc/cpu/*.o -o build/kernels
	$(AARCH64_CXX) $(KERNELS_FLAGS) -O1 -static tests/threads/kernels.cpp csrc/cpu/*.cpp -o build/kernels-aarch64
	set -ex; export ATEN_CPU_CAPABILITY=avx512; qemu-x86_64 -cpu Haswell,check=off build/kernels | grep ^avx2; \
	  qemu-x86_64 -cpu Nehalem build/kernels > build/kernels.log; grep ^base build/kernels.log; \
	  qemu-aarch64 build/kernels-aarch64 | diff build/kernels.log -

versions: $(REQUIREMENTS)  ## run make test-all and the self-test under several versions of torch, each in its own clone; downloads gigabytes
	@set -e; tried=; left_out=; admitted=$$($(TRY_INSTALL) --report - torch | .venv/bin/python -c "$$PRINT_ADMITTED"); \
	  for torch in $$(printf '%s\n' $(VERSIONS) $$admitted | sort -uV); do \
	  if ! $(TRY_INSTALL) torch==$$torch; then left_out="$$left_out $$torch"; continue; fi; \
	  rm -rf build/torch-$$torch; git clone --quiet . build/torch-$$torch; $(MAKE) -C build/torch-$$torch test-all TORCH=$$torch; \
	  (cd build/torch-$$torch; .venv/bin/python -m gradkernels selftest); tried="$$tried $$torch"; done; \
	  echo "versions tested:$$tried; left out, because pip cannot install them here:$${left_out:- none}"; test -n "$$tried"

models: $(REQUIREMENTS)  ## what convert fuses in 166 models of libraries, and trainers, under the newest torch in a clone; downloads gigabytes
	rm -rf build/models; git clone --quiet . build/models
	torch=$$($(TRY_INSTALL) --report - torch | .venv/bin/python -c "$$PRINT_ADMITTED"); \
	  $(MAKE) -C build/models build TORCH=$$torch && build/models/.venv/bin/pip install torch==$$torch $(LIBRARIES)
	cd build/models; .venv/bin/python tests/real_models.py --out "$(CURDIR)/bench/results"; rc=$$?; \
	  .venv/bin/python -m pytest -m "" tests/test_trainers.py tests/test_integrations.py && exit $$rc

lint: $(REQUIREMENTS)  ## check with ruff, mypy and clang-format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(REQUIREMENTS)  ## rewrite files with ruff and clang-format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

bench: $(LIBRARY)  ## every operator and whole training steps compared with torch's, into bench/results
	.venv/bin/python -m gradkernels bench

docs: $(DOCS_REQUIREMENTS)  ## the documentation, into build/site; installs no torch and compiles nothing
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

cuda-check: $(CUDA_REQUIREMENTS)  ## compile for CUDA, load the library, inspect its machine code; needs nvcc but no GPU
	rm -rf build/cuda/lib
	CUDA_HOME="$(CUDA_HOME)" FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
	  .venv-cuda/bin/python setup.py -q build --build-base build/cuda --build-lib build/cuda/lib
	cd build/cuda/lib && ../../../.venv-cuda/bin/python -c 'from gradkernels import _native; assert _native.C is not None, _native.reason'
	cd build/cuda/lib && ../../../.venv-cuda/bin/python -m gradkernels info
	.venv-cuda/bin/python tests/inspect_cuda_code.py build/cuda/lib/gradkernels/_C.*.so

cuda-check-all: CUDA_ARCHITECTURES := 7.5;8.0;9.0;10.0;12.0+PTX
cuda-check-all: cuda-check  ## the same with the architectures that no package is built for

clean:  ## what the build left; .venv, .venv-docs and .venv-cuda stay
	rm -rf build dist gradkernels.egg-info gradkernels/*.so

# The library's objects are reused. auditwheel says for which systems a wheel is, and changes nothing else in it: torch's
# libraries, which torch has loaded, are excluded. build/wheel/*/lib must be new, because it may have files that are gone.
wheel: $(LIBRARY)  ## an sdist and two wheels into dist/: for every torch, and for this torch (not for an index)
	rm -rf build/wheel dist
	set -e; export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct); .venv/bin/python setup.py -q sdist; \
	  for kind in portable native; do tag=; if [ $$kind = native ]; then tag=+torch$$(.venv/bin/python -c "$$PRINT_TORCH"); fi; \
	  GRADKERNELS_PORTABLE=$$(test $$kind = native || echo 1) .venv/bin/python setup.py -q egg_info --tag-build="$$tag" \
	    build --build-lib build/wheel/$$kind/lib bdist_wheel --skip-build --bdist-dir build/wheel/$$kind/root --dist-dir build/wheel; done
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	ls -l dist

# Folders are prerequisites too, because removing a file changes their age.
$(LIBRARY): $(REQUIREMENTS) setup.py $(shell find csrc)
	.venv/bin/python setup.py build_ext --inplace
	touch $@

$(REQUIREMENTS): pyproject.toml Makefile
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -c "$$PRINT_REQUIREMENTS" build demo dev > .venv/requirements.txt
	.venv/bin/pip install $(if $(CI),--progress-bar off) torch==$(TORCH) -r .venv/requirements.txt
	rm -f .venv/.requirements-*
	touch $@

$(DOCS_REQUIREMENTS): pyproject.toml Makefile
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c "$$PRINT_REQUIREMENTS" docs > .venv-docs/requirements.txt
	.venv-docs/bin/pip install $(if $(CI),--progress-bar off) -r .venv-docs/requirements.txt
	touch $@

$(CUDA_REQUIREMENTS): Makefile
	test -x .venv-cuda/bin/pip || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install $(if $(CI),--progress-bar off) torch==$(CUDA_TORCH) "setuptools>=77" ninja numpy
	rm -f .venv-cuda/.requirements-*
	touch $@
