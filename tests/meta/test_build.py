"""setup.py: what it says and does where the extension can, cannot or must not be built."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
PIECES = ("setup.py", "pyproject.toml", "csrc", "drivekd", "kernels", "LICENSE", "README.md")


def run_setup(*command, cwd=ROOT, **environment):
    """`python setup.py ...` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy that may be built in."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
    for piece in PIECES:
        source = ROOT / piece
        if source.is_dir():
            shutil.copytree(source, tmp_path / piece, ignore=ignore)
        elif source.exists():
            shutil.copy(source, tmp_path)
    (tmp_path / "README.md").touch()
    return tmp_path


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def no_torch(tmp_path):
    """PYTHONPATH of an interpreter that has setuptools but no torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    return str(tmp_path)


REASONS = {
    "no compiler": ({"CXX": "/nowhere/g++"}, "no C++ compiler"),
    "a compiler that fails": ({"CXX": "false"}, "false fails on a trial file"),
    "no torch": ({"PYTHONPATH": "no torch"}, "torch cannot be imported"),
}


@pytest.mark.parametrize("environment, reason", REASONS.values(), ids=REASONS)
def test_without_means_it_installs_plain_python_and_says_so_in_one_line(
    environment, reason, tmp_path
):
    environment = dict(environment)
    if environment.get("PYTHONPATH") == "no torch":
        environment["PYTHONPATH"] = no_torch(tmp_path)
    code, output = run_setup("--version", DRIVEKD_BUILD="auto", **environment)
    assert code == 0
    (line,) = [line for line in output.splitlines() if line.startswith("drivekd:")]
    assert reason in line
    assert "DRIVEKD_BUILD=1" in line

    code, output = run_setup("--version", DRIVEKD_BUILD="1", **environment)
    assert code != 0
    assert reason in output


def test_zero_builds_nothing_and_other_values_are_refused():
    code, output = run_setup("--version", DRIVEKD_BUILD="0")
    assert code == 0
    assert "DRIVEKD_BUILD is 0" in output
    code, output = run_setup("--version", DRIVEKD_BUILD="yes")
    assert code != 0
    assert "DRIVEKD_BUILD is 'yes'; wanted auto, 0 or 1" in output


def test_a_compiler_that_fails_later_costs_the_extension_only(checkout, tmp_path):
    """The trial compiles, the sources do not: too little memory, broken headers, a full disk."""
    compiler = script(
        tmp_path / "halfway",
        '#!/bin/sh\ncase "$*" in *fsyntax-only*|*version*) exit 0;; *) exit 1;; esac\n',
    )
    command = ("build_ext", "--inplace")
    code, output = run_setup(*command, cwd=checkout, DRIVEKD_BUILD="auto", CXX=compiler)
    assert code == 0, output
    assert "installing without the compiled extension" in output
    assert not list((checkout / "drivekd").glob("_C*"))
    code, output = run_setup(*command, cwd=checkout, DRIVEKD_BUILD="1", CXX=compiler)
    assert code != 0


def test_torch_is_found_through_build_isolation(tmp_path):
    """pip's isolated interpreter sees setuptools, but none of the user's packages."""
    packages = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DRIVEKD_BUILD": "1"}
    isolated = [sys.executable, "-S"]
    alone = subprocess.run([*isolated, "-c", "import torch"], env=environment, capture_output=True)
    assert alone.returncode != 0
    done = subprocess.run(
        [*isolated, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "building drivekd._C against torch" in done.stderr


def test_hugging_faces_package_of_our_folders_name_is_no_hindrance(checkout, tmp_path):
    """`kernels`, their loader, adds a writer to egg_info and is what transformers imports."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("loader = True\n")
    (site / "kernels" / "lockfile.py").write_text("def write(command, name, path):\n    pass\n")
    info = site / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (info / "entry_points.txt").write_text("[egg_info.writers]\nk.lock = kernels.lockfile:write\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "DRIVEKD_BUILD": "0"}
    for command in (
        ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        ["-c", "import kernels; assert kernels.loader"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr


def wheel_of(checkout, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", "wheels", "."],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist())


def test_the_plain_wheel_has_every_package_and_nothing_else(checkout):
    name, files = wheel_of(checkout, DRIVEKD_BUILD="0")
    assert name.endswith("-py3-none-any.whl")
    sources = [p for p in (checkout / "drivekd").rglob("*.py") if p.parent.name != "__pycache__"]
    assert {str(p.relative_to(checkout)) for p in sources} <= files
    assert {"drivekd/py.typed", "drivekd_kernels/__init__.py"} <= files
    assets = [p for p in (checkout / "drivekd/demo/assets").rglob("*") if p.is_file()]
    assert {str(p.relative_to(checkout)) for p in assets} <= files
    tops = {name.split("/")[0] for name in files if ".dist-info" not in name}
    assert tops == {"drivekd", "drivekd_kernels"}


@pytest.mark.slow
def test_the_compiled_wheel_works_for_every_python_from_311(checkout):
    name, files = wheel_of(checkout, DRIVEKD_BUILD="1", MAX_JOBS="2")
    assert "-cp311-abi3-" in name
    assert "drivekd/_C.abi3.so" in files
    assert not [own for own in files if own.endswith((".cpp", ".h", ".o"))]


CORES = [path for part in ("core", "cuda") for path in (ROOT / "csrc" / part).iterdir()]


def test_the_core_knows_neither_torch_nor_python():
    for path in CORES:
        text = path.read_text()
        assert "#include <torch" not in text, path
        assert "Python.h" not in text, path


def test_setup_lists_every_source():
    text = (ROOT / "setup.py").read_text()
    for path in CORES:
        assert f'"{path.stem}"' in text or f'"{path.name}"' in text, path
