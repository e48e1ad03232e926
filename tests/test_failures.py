"""Failures around the operators: parameters, running statistics and gradients do not change.

A failure that may end a process, or that needs a preloaded library, happens in a process of its own.
test_native.py tests wrong and damaged libraries, test_sync_batch_norm_act.py a process that dies.
"""

import ast
import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gradkernels as gk
from accuracy import assert_bitwise_equal
from test_native import USE_EVERYTHING, copy_of_the_package, library, run

ROOT = Path(__file__).resolve().parents[1]

# Repeats each operation with its first, second, third ... large allocation refused, until it succeeds.
OUT_OF_MEMORY = """
import ctypes
import torch
from torch import nn
import gradkernels as gk

malloc = ctypes.CDLL(None)
malloc.fail_after.argtypes = [ctypes.c_long, ctypes.c_size_t]
BYTES = 1 << 14
CHANNELS = 4096
torch.set_num_threads(2)
torch.manual_seed(0)

def operation(name):
    '''A call, and the tensors that it must not change if it fails.'''
    x = torch.randn(48, CHANNELS, requires_grad=True)
    residual = torch.randn(CHANNELS, 48).t().requires_grad_()
    parameter = nn.Parameter(torch.randn(CHANNELS))
    parameter.grad = torch.randn(2 * CHANNELS)[::2]
    gapped = torch.randn(48, 2 * CHANNELS)[:, ::2]
    module = gk.BatchNormAct1d(CHANNELS, act="swish")
    buffers = [*module.state_dict().values()]
    halves = [buffer.half() for buffer in buffers[2:4]]
    square = nn.Parameter(torch.randn(CHANNELS // 64, 64))
    square.grad = torch.randn(64, CHANNELS // 64).t()
    dense = nn.Parameter(torch.randn(CHANNELS))
    dense.grad = torch.randn(CHANNELS)
    optimizer = gk.optim.RMSprop([dense], centered=True, max_norm=1.0)
    pixels = torch.randn(2, CHANNELS, 7, 7, requires_grad=True)
    groups = gk.GroupNormAct(64, CHANNELS, act="swish")
    instances = gk.InstanceNormAct2d(CHANNELS, affine=True, track_running_stats=True, act="relu")
    if name.startswith("backward"):
        act = {"backward of batch_norm_act": lambda: module(x, residual), "backward of group_norm_act": lambda: groups(pixels),
               "backward of leaky_relu": lambda: gk.leaky_relu(x), "backward of prelu": lambda: gk.prelu(x, parameter)}[name]
        y = act()
        leaves = [x, residual, parameter, pixels, *module.parameters(), *groups.parameters()]
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        return y.sum().backward, [*leaves, *[leaf.grad for leaf in leaves], *buffers]
    calls = {
        "batch_norm_act": (lambda: module(x, residual), [x, residual, *buffers]),
        "batch_norm_act of one value each": (lambda: gk.batch_norm_act(x[:1].half(), *halves), halves),
        "group_norm_act": (lambda: groups(pixels), [pixels, *groups.parameters()]),
        "InstanceNormAct2d": (lambda: instances(pixels, pixels), [pixels, *instances.state_dict().values()]),
        "leaky_relu": (lambda: gk.leaky_relu(x), [x]),
        "leaky_relu in place": (lambda: gk.leaky_relu(gapped, inplace=True), [gapped]),
        "swish with a tensor": (lambda: gk.swish(gapped, parameter), [gapped, parameter]),
        "rrelu in place": (lambda: gk.rrelu(gapped, training=True, inplace=True), [gapped]),
        "clip_grad_norm_": (lambda: gk.clip_grad_norm_([parameter], 0.1), [parameter, parameter.grad]),
        "clip_grad_value_": (lambda: gk.clip_grad_value_([parameter], 0.1), [parameter, parameter.grad]),
        "adaptive_clip_grad_": (lambda: gk.adaptive_clip_grad_([square], 0.1), [square, square.grad]),
        "RMSprop": (optimizer.step, [dense, dense.grad]),
    }
    return calls.get(name) or calls.keys()

def bits(tensors):
    return [each.detach().clone() for each in tensors]

names = [*operation("")]
names += ["backward of batch_norm_act", "backward of group_norm_act", "backward of leaky_relu", "backward of prelu"]
for name in names:
    operation(name)[0]()  # imports modules while there is memory
    failures = 0
    while True:
        call, kept = operation(name)
        before = bits(kept)
        malloc.fail_after(failures, BYTES)
        error = None
        try:
            result = call()
        except (MemoryError, RuntimeError) as raised:
            error = raised
        malloc.fail_after(-1, 0)
        if error is None:
            break
        assert isinstance(error, MemoryError) or "alloc" in str(error), f"{name}: {error!r}"
        assert all(torch.equal(a, b) for a, b in zip(before, bits(kept))), f"{name} wrote something before it failed: {error}"
        failures += 1
        assert failures < 60, name
    assert failures > 0, f"{name} allocates nothing"
    print(name, failures)
"""


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    target = tmp_path_factory.mktemp("preload") / "failing_malloc.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", ROOT / "tests/failing_malloc.c", "-o", target, "-ldl"], check=True)
    return target


def test_out_of_memory_half_way(failing_malloc):
    printed = run("-c", OUT_OF_MEMORY, folder=ROOT, LD_PRELOAD=str(failing_malloc))
    assert len(printed.splitlines()) == 16, printed


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), gk.BatchNormAct1d(8, act="elu"), gk.LeakyReLU(), nn.Linear(8, 8), gk.Swish(), nn.Linear(8, 1))


def test_interrupt_in_a_backward():
    """Layers that the gradient has not reached have no gradient, and the next backward gives all gradients."""
    # A shell that runs pytest in the background makes it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, expected = network(), network()
    x = torch.randn(16, 6)
    y = model[:3](x)
    y.register_hook(lambda grad: signal.raise_signal(signal.SIGINT))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(KeyboardInterrupt):
        model[3:](y).sum().backward()
    assert all(parameter.grad is None for parameter in model[:3].parameters())
    for name, buffer in model.named_buffers():
        assert_bitwise_equal(name, buffer, buffers[name])
    model.zero_grad()
    expected(x)
    for each in (model, expected):
        each(x).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_bitwise_equal(name, parameter.grad, other.grad)


class Activated(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.linspace(-3, 3, 100_000) + i
        parameter = nn.Parameter(torch.zeros(100_000))
        parameter.grad = gk.elu(x) + gk.batch_norm_act(x.view(10, -1), None, None, training=True, act="swish").view(-1)
        return parameter.grad, gk.clip_grad_norm_(parameter, 1.0).expand(1)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(method):
    """This process has started threads, which a forked worker does not have."""
    expected = [Activated()[i] for i in range(4)]
    loader = DataLoader(Activated(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60)
    for got, want in zip(loader, expected, strict=True):
        for ours, theirs in zip(got, want, strict=True):
            assert_bitwise_equal("what the worker computed", ours, theirs)


def test_threads_calling_at_once():
    """Each thread has its own operands; a module in evaluation is shared."""
    shared = gk.BatchNormAct2d(8, act="leaky_relu").eval()

    def compute(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 8, 40, 40, generator=generator, requires_grad=True)
        module = gk.BatchNormAct2d(8, act="swish")
        y = gk.leaky_relu(gk.elu(module(shared(x)), inplace=True))
        y.square().sum().backward()
        norm = gk.clip_grad_norm_([x, *module.parameters()], 0.5)
        return [y.detach(), x.grad, norm, module.weight.grad, module.running_var]

    alone = [compute(seed) for seed in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(compute, range(16)))
    for expected, actual in zip(alone, together, strict=True):
        for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise_equal(f"result {i}", ours, theirs)


# The installation

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "pickle",
    "marshal",
    "shelve",
    "socket",
    "urllib",
    "urllib.request",
    "http",
    "subprocess",
    "environ",
    "getenv",
}


def test_the_library_needs_no_openmp_of_its_own():
    """It uses the libgomp that torch brings, so the system's may be missing or another one."""
    if shutil.which("readelf") is None:
        pytest.skip("binutils (readelf) are not installed")
    dynamic = subprocess.run(["readelf", "--dynamic", library()], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(lib\w+)", dynamic))
    assert needed <= {
        "libc10",
        "libtorch",
        "libtorch_cpu",
        "libtorch_python",
        "libstdc",
        "libm",
        "libgcc_s",
        "libc",
        "libtorch_cuda",
        "libc10_cuda",
    }
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def changed(offset, replacement):
    image = bytearray(library().read_bytes())
    image[offset : offset + len(replacement)] = replacement
    return bytes(image)


@pytest.mark.slow
@pytest.mark.parametrize(
    "image",
    [
        lambda: library().read_bytes().replace(b"libtorch_cpu.so\0", b"libtorch_cpU.so\0"),
        lambda: changed(18, b"\xb7\x00"),
        lambda: changed(32, b"\xff" * 8),
        lambda: library().read_bytes().replace(b"PyInit__C\0", b"PyInit__D\0"),
    ],
    ids=["a missing library", "processor", "segments", "entry point"],
)
def test_a_corrupted_library_is_not_loaded(image, tmp_path):
    folder = copy_of_the_package(tmp_path, image())
    result = json.loads(run("-c", USE_EVERYTHING, folder=folder))
    assert not result["native"] and result["different"] == []
    assert re.search("damaged|does not load", result["reason"]), result["reason"]
    ((category, message, _),) = result["warnings"]
    assert category == "RuntimeWarning" and result["remedy"] in message


# Records the events that Python reports: files written, connections, programs, pickles.
AUDITED = """
import os, sys
import torch

seen = []
def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.partition(".")[0] in ("socket", "subprocess", "pickle", "urllib", "shutil", "tempfile") or event in (
        "os.system", "os.mkdir", "os.remove", "os.rename", "os.exec", "os.fork", "os.posix_spawn"
    ):
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(audit)
"""


def test_no_file_no_network_no_program_no_pickle(tmp_path):
    """So the package works from a read-only installation too."""
    folder = copy_of_the_package(tmp_path, library().read_bytes())
    code = AUDITED + USE_EVERYTHING + "\nassert not seen, seen\n"
    run("-c", code, folder=folder, PYTHONDONTWRITEBYTECODE="1")


def test_a_read_only_installation(tmp_path):
    """The superuser may write everywhere: then this test checks no more than the test above."""
    folder = copy_of_the_package(tmp_path, library().read_bytes())
    for path in (folder / "gradkernels", *(folder / "gradkernels").iterdir()):
        path.chmod(path.stat().st_mode & ~0o222)
    run("-W", "error::RuntimeWarning", "-c", USE_EVERYTHING, folder=folder)


def test_the_package_evaluates_no_text_and_reads_no_environment():
    """There are three exceptions.

    ATEN_CPU_CAPABILITY is a variable of torch. The benchmark runs in a process of its own. The code that
    torch.fx writes for a graph is executed as in torch.fx.GraphModule.
    """
    found = set()
    for path in sorted((ROOT / "gradkernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id}
            else:
                names = {node.attr} if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") else set()
            found |= {(path.name, name) for name in names & FORBIDDEN}
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        found |= {(path.name, name) for name in ("getenv", "dlopen", "system(", "popen") if name in path.read_text()}
    of_a_graph = {("guard.py", "exec"), ("guard.py", "compile")}
    assert found == {("kernels.cpp", "getenv"), ("__main__.py", "subprocess"), *of_a_graph}


def test_no_compiler_at_install(tmp_path):
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "__pycache__", "tests"))
    command = [sys.executable, "setup.py", "build_ext"]
    result = subprocess.run(command, cwd=copy, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert "no-such-compiler" in result.stderr and "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_library_is_hardened():
    """The flags in setup.py reach the compiler and the linker."""
    if shutil.which("readelf") is None:
        pytest.skip("binutils (readelf) are not installed")
    printed = subprocess.run(
        ["readelf", "--dynamic", "--segments", "--dyn-syms", "--wide", library()], check=True, capture_output=True, text=True
    )
    for word in ("NOW", "GNU_RELRO", "__stack_chk_fail"):
        assert word in printed.stdout, f"no {word} in {library().name}"
    assert re.search(r"GNU_STACK.* RW ", printed.stdout), "the stack is executable"
