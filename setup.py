"""Builds `drivekd._C` against the torch that is already installed, or installs without it.

`DRIVEKD_BUILD` is `auto` (build where possible, the default), `1` (fail where not) or `0`. Torch is
no build requirement: an unpinned one would bring gigabytes into the build environment, and might be
another one than at run time. The CUDA sources are compiled where torch is a CUDA build and there is
an nvcc; a GPU is not asked for. csrc/README.md says more.
"""

import glob
import json
import os
import shlex
import shutil
import subprocess
import sys

import setuptools

MINIMUM_TORCH = (2, 11)
STABLE_ABI = "0x020b000000000000"  # of MINIMUM_TORCH
CORE = ("gram", "combine", "isa", "isa_base", "isa_avx2", "isa_avx512")
SOURCES = ["csrc/bindings.cpp", *(f"csrc/core/{name}.cpp" for name in CORE)]
HEADERS = [
    f"csrc/core/{name}" for name in ("drivekd_core.h", "kernels.h", "kernels.inc", "chunks.h")
]
CUDA_SOURCES = [f"csrc/cuda/{name}.cu" for name in ("gram", "combine")]
CUDA_HEADERS = [f"csrc/cuda/{name}" for name in ("drivekd_cuda.h", "tables.h", "elements.cuh")]
CUDA_ARCHITECTURES = (80, 90, 100)  # and PTX of the last; TORCH_CUDA_ARCH_LIST replaces them
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
# What the core needs of a compiler: the vector extensions of GCC and Clang.
TRIAL = """
typedef float pair __attribute__((vector_size(8)));
typedef double wide __attribute__((vector_size(16)));
wide widen(pair x) { return __builtin_convertvector(x, wide); }
"""


class BuildImpossibleError(Exception):
    """Why there will be no extension."""


def say(message):
    print(f"drivekd: {message}", file=sys.stderr, flush=True)


def build_mode():
    mode = os.environ.get("DRIVEKD_BUILD", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"drivekd: DRIVEKD_BUILD is {mode!r}; wanted auto, 0 or 1")
    return mode


def path_outside_isolation():
    """sys.path of this interpreter without pip's build isolation.

    pip hides the installed packages by environment variables and a sitecustomize; sys.executable is
    still the user's interpreter, so a child without those variables sees what the user sees.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    code = "import json, sys; print(json.dumps(sys.path))"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=os.path.abspath(os.sep),
        capture_output=True,
        text=True,
        check=False,
    )
    return [entry for entry in json.loads(child.stdout or "[]") if entry]


def find_torch():
    try:
        import torch
    except ImportError:
        # At the end of the path, so that the isolated setuptools stays first.
        sys.path += [entry for entry in path_outside_isolation() if entry not in sys.path]
        try:
            import torch
        except ImportError as error:
            raise BuildImpossibleError(
                f"torch cannot be imported ({error}); install it first"
            ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise BuildImpossibleError(f"torch is {torch.__version__}, older than {wanted}")
    return torch


def check_compiler():
    default = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    compiler = shlex.split(os.environ.setdefault("CXX", default))
    if shutil.which(compiler[0]) is None:
        raise BuildImpossibleError(
            f"there is no C++ compiler {compiler[0]!r}; install g++ or clang++"
        )
    command = [*compiler, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    trial = subprocess.run(command, input=TRIAL, capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        lines = trial.stderr.strip().splitlines()
        detail = f": {lines[0]}" if lines else ""
        raise BuildImpossibleError(f"{compiler[0]} fails on a trial file{detail}")


def find_nvcc(torch):
    """Path of the nvcc to compile with, or None."""
    if torch.version.cuda is None:
        return None
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    if nvcc is None or shutil.which(nvcc) is None:
        say("building without the CUDA kernels of drivekd._C: there is no nvcc; set CUDA_HOME")
        return None
    return nvcc


def cuda_flags(nvcc):
    """Flags of nvcc: the architectures that it knows of those that we ship."""
    flags = ["-std=c++17", "-O3"]
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return flags
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}\n" in listing.stdout]
    if not known:
        raise BuildImpossibleError(f"{nvcc} knows none of sm_80, sm_90, sm_100")
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def cpu_extension():
    from torch.utils import cpp_extension

    return cpp_extension.CppExtension(
        "drivekd._C",
        SOURCES,
        depends=[*HEADERS, *CUDA_SOURCES, *CUDA_HEADERS],  # so that a source archive has them all
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
    )


def cuda_extension(nvcc):
    from torch.utils import cpp_extension

    extension = cpp_extension.CUDAExtension(
        "drivekd._C",
        [*SOURCES, *CUDA_SOURCES],
        depends=[*HEADERS, *CUDA_HEADERS],
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("DRIVEKD_CUDA", "1")],
        extra_compile_args={"cxx": FLAGS, "nvcc": cuda_flags(nvcc)},
        py_limited_api=True,
    )
    # A toolkit made of Python packages has no libcudart.so to link with; torch brings the library.
    if not any(glob.glob(os.path.join(path, "libcudart.so")) for path in extension.library_dirs):
        extension.libraries = [name for name in extension.libraries if name != "cudart"]
    return extension


def extension_arguments():
    """Arguments of setup() that build the extension."""
    if build_mode() == "0":
        raise BuildImpossibleError("DRIVEKD_BUILD is 0")
    check_compiler()
    torch = find_torch()
    from torch.utils import cpp_extension

    nvcc = find_nvcc(torch)
    cuda = f" with {nvcc}" if nvcc else ""
    say(f"building drivekd._C against torch {torch.__version__}{cuda}")
    return {
        "ext_modules": [cuda_extension(nvcc) if nvcc else cpu_extension()],
        "cmdclass": {"build_ext": tolerant(cpp_extension.BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def drop_cuda(extension):
    """Turn an extension back into the one without CUDA; whether it was another."""
    plain = cpu_extension()
    if extension.sources == plain.sources:
        return False
    for name in ("sources", "depends", "define_macros", "include_dirs", "library_dirs"):
        setattr(extension, name, getattr(plain, name))
    extension.libraries = plain.libraries
    extension.extra_compile_args = plain.extra_compile_args
    return True


def tolerant(build_extension):
    """BuildExtension that leaves out what does not compile: the CUDA kernels, then everything."""

    class BuildExtension(build_extension):
        def run(self):
            before = self.inplace, self.compiler
            try:
                super().run()
            except Exception as error:
                if build_mode() == "1":
                    raise
                reason = f"the compiler failed ({type(error).__name__}; pip -v shows how)"
                self.inplace, self.compiler = before
                if drop_cuda(*self.extensions):
                    say(f"building without the CUDA kernels of drivekd._C: {reason}")
                    self.run()
                else:
                    say_missing(reason)
                    self.extensions = []

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

        def get_output_mapping(self):
            return super().get_output_mapping() if self.extensions else {}

    return BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)


def say_missing(reason):
    say(
        f"installing without the compiled extension, in plain PyTorch: {reason}. "
        "DRIVEKD_BUILD=1 makes this an error."
    )


def arguments():
    try:
        return extension_arguments()
    except BuildImpossibleError as reason:
        if build_mode() == "1":
            sys.exit(f"drivekd: DRIVEKD_BUILD is 1, but {reason}")
        say_missing(reason)
        return {}


setuptools.setup(**arguments())
