"""The CUDA sources without a GPU: they compile cleanly, and setup.py knows when to compile them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.meta.test_build import ROOT, checkout, run_setup, script  # noqa: F401  (a fixture)

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
SOURCES = ("gram", "combine")
ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
BINDING = ROOT / "csrc" / "bindings.cpp"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(source, architecture) -> (cubin, what ptxas said); each compiled once."""
    done = {}

    def compile_once(source, arch):
        if (source, arch) not in done:
            cubin = tmp_path_factory.mktemp("cubin") / f"{source}.cubin"
            command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
            path = ROOT / "csrc" / "cuda" / f"{source}.cu"
            run = subprocess.run(
                [*command, f"-I{ROOT / 'csrc'}", path, "-o", cubin],
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert run.returncode == 0, run.stderr
            assert "warning" not in run.stderr, run.stderr
            done[source, arch] = cubin, run.stderr
        return done[source, arch]

    return compile_once


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_or_has_a_stack(compiled, source, arch):
    _, said = compiled(source, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert len(frames) == 32 + (source == "gram")  # four dtypes, up to eight gradients; the fold
    assert set(frames) == {("0", "0", "0")}, Counter(frames)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 255 and len(registers) == len(frames)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_are_read_and_written_16_bytes_at_a_time(compiled, source):
    """Every kernel has a 16-byte load for each gradient, and for what it adds to."""
    triton = pytest.importorskip("triton", reason="needs cuobjdump, which triton brings")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin, _ = compiled(source, 90)
    listing = subprocess.run(
        [tool, "--dump-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    kernels = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing, re.DOTALL))
    seen = 0
    for name, code in kernels.items():
        count = re.search(r"EntryILi(\d)E|_kernelI\w+?Li(\d)E", name)
        if "fold" in name or count is None:
            continue
        wanted = int(next(filter(None, count.groups())))
        seen += 1
        assert code.count("LDG.E.128") >= wanted + (source == "combine"), name
        assert code.count("STG.E.128") >= (source == "combine"), name
        assert "LDL" not in code and "STL" not in code, name
    assert seen == 32


def test_the_binding_fits_torchs_headers():
    """It cannot be linked with a CPU build of torch, but its CUDA half can be read."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    paths = [*include_paths(), sysconfig.get_paths()["include"]]
    for macro in ("-DDRIVEKD_CUDA", "-UDRIVEKD_CUDA"):
        command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        command += [STABLE_ABI, "-DPy_LIMITED_API=0x030b0000", macro, f"-I{ROOT / 'csrc'}"]
        done = subprocess.run(
            [*command, *(f"-isystem{path}" for path in paths), BINDING],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr


def test_the_binding_uses_no_macro_that_torch_2_11_lacks():
    """It did, in code that only a build for CUDA compiles: with torch 2.11 it had no CUDA kernels.

    Functions of later versions are hidden by TORCH_TARGET_VERSION, macros are not.
    """
    macros = set(re.findall(r"\b(?:STD_|STABLE_)?TORCH_[A-Z_]+(?=\()", BINDING.read_text()))
    assert macros == {
        "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX",
        "TORCH_ERROR_CODE_CHECK",
    }  # fmt: skip


def cuda_torch(tmp_path, cuda_home):
    """PYTHONPATH of an interpreter whose torch says that it is built for CUDA and sees no GPU."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.version.cuda = '13.0'\n"
        "import torch.utils.cpp_extension as extension\n"
        f"extension.CUDA_HOME = {str(cuda_home) if cuda_home else None!r}\n"
    )
    return str(tmp_path)


def toolkit(tmp_path, compiles):
    """A CUDA_HOME whose nvcc answers questions as one would, and compiles nothing."""
    (tmp_path / "bin").mkdir()
    script(
        tmp_path / "bin" / "nvcc",
        '#!/bin/sh\ncase "$*" in\n'
        "*--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n';;\n"
        "*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\n"
        f"*) exit {0 if compiles else 1};;\nesac\n",
    )
    return tmp_path


def lines_of_ours(output):
    return [line for line in output.splitlines() if line.startswith("drivekd:")]


def test_a_cuda_torch_and_an_nvcc_are_enough(tmp_path):
    """No GPU is asked for: machines that build often have none."""
    home = toolkit(tmp_path, compiles=True)
    path = cuda_torch(tmp_path, home)
    code, output = run_setup("--version", DRIVEKD_BUILD="1", PYTHONPATH=path)
    assert code == 0
    (line,) = lines_of_ours(output)
    assert f"with {home}/bin/nvcc" in line


def test_without_nvcc_there_are_no_cuda_kernels_and_one_line_says_so(tmp_path):
    path = cuda_torch(tmp_path, None)
    code, output = run_setup("--version", DRIVEKD_BUILD="1", PYTHONPATH=path)
    assert code == 0
    first, second = lines_of_ours(output)
    assert "without the CUDA kernels" in first and "no nvcc" in first
    assert "nvcc" not in second


def test_a_cpu_torch_says_nothing_about_cuda():
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    code, output = run_setup("--version", DRIVEKD_BUILD="1")
    assert code == 0
    (line,) = lines_of_ours(output)
    assert "CUDA" not in line and "nvcc" not in line


@pytest.mark.slow
def test_cuda_sources_that_do_not_compile_cost_the_cuda_kernels_only(checkout, tmp_path):  # noqa: F811
    (tmp_path / "tools").mkdir()
    path = cuda_torch(tmp_path, toolkit(tmp_path / "tools", compiles=False))
    command = ("build_ext", "--inplace")
    environment = {"PYTHONPATH": path, "MAX_JOBS": "2"}
    code, output = run_setup(*command, cwd=checkout, DRIVEKD_BUILD="1", **environment)
    assert code != 0
    code, output = run_setup(*command, cwd=checkout, DRIVEKD_BUILD="auto", **environment)
    assert code == 0, output
    assert "building without the CUDA kernels" in output
    assert list((checkout / "drivekd").glob("_C*"))


@pytest.mark.slow
@needs_nvcc
def test_a_whole_build_for_cuda_links_and_loads(checkout, tmp_path):  # noqa: F811
    """With stand-ins for torch's CUDA libraries: an undefined symbol would keep it from loading."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    homes = [home, *sorted(home.parent.glob("cuda-*"))]
    home = next((each for each in homes if (each / "lib64" / "libcudart.so").exists()), None)
    if home is None or shutil.which("gcc") is None:
        pytest.skip("needs a CUDA toolkit with libcudart.so, and gcc")
    if torch.version.cuda is not None:
        pytest.skip("this torch has the libraries; see the tests on a GPU")
    stand_in = tmp_path / "stand_in.c"
    stand_in.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n")
    for name in ("c10_cuda", "torch_cuda"):
        command = ["gcc", "-shared", "-fPIC", stand_in, "-o", tmp_path / f"lib{name}.so"]
        subprocess.run(command, check=True)
    code, output = run_setup(
        "build_ext",
        "--inplace",
        cwd=checkout,
        DRIVEKD_BUILD="1",
        PYTHONPATH=cuda_torch(tmp_path, home),
        LIBRARY_PATH=str(tmp_path),
        MAX_JOBS="2",
    )
    assert code == 0, output
    check = (
        "import torch, drivekd._C\n"
        "assert torch.ops.drivekd_native.cuda_version() >= 12060\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert has('drivekd_native::gram', 'CUDA') and has('drivekd_native::combine', 'CUDA')\n"
        "from drivekd.functional import gradient_gram\n"
        "assert gradient_gram([[torch.ones(5)]], backend='native').total.item() == 5\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(tmp_path), str(home / "lib64")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
