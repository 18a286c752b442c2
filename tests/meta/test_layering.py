"""Who may import whom, as the code says it (module level and inside functions alike)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package -> parts of drivekd it may import. "errors" is open to everybody but the reference.
ALLOWED = {
    "errors": set(),
    "validation": {"errors", "tokens"},
    "tokens": {"errors"},
    "pairing": {"errors"},
    "reference": {"reference"},
    "ops": {"errors", "ops"},
    "autograd": {"ops", "autograd", "errors"},
    "functional": {"autograd", "ops", "validation", "tokens", "errors", "functional"},
    "losses": {"functional", "tokens", "pairing", "errors"},
    "phases": set(),
    "projection": {
        "projection", "functional", "tokens", "pairing", "errors", "reweighting", "phases",
    },
    "reweighting": {"reweighting", "functional", "errors"},
    "capture": {"capture", "functional", "tokens", "pairing", "errors"},
    "data": {"data", "tokens", "errors"},
    "driving": {"driving", "data", "errors"},
    "train": {
        "train", "data", "losses", "projection", "reweighting", "capture", "functional",
        "tokens", "pairing", "errors", "phases",
    },
    "study": {
        "study", "train", "data", "losses", "projection", "reweighting", "capture", "functional",
        "tokens", "pairing", "errors", "phases",
    },
    "demo": {
        "demo", "train", "driving", "study", "data", "functional", "capture", "tokens", "errors",
    },
    "doctor": {"ops", "errors", "doctor"},
    "cli": {"train", "driving", "study", "demo", "data", "doctor", "errors", "cli"},
}  # fmt: skip

# Third-party packages that only these may import, and whether only inside functions.
RESTRICTED = {
    "triton": set(),
    "transformers": {"capture", "data", "train", "demo", "study", "cli", "doctor"},
    "datasets": {"data"},
    "highway_env": {"driving"},
    "gymnasium": {"driving"},
    "matplotlib": {"study"},
}
LAZY_ONLY = {
    ("transformers", "capture"), ("transformers", "data"), ("datasets", "data"),
    ("highway_env", "driving"),
    ("gymnasium", "driving"), ("torch", "driving"), ("transformers", "cli"),
}  # fmt: skip


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "drivekd").parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path: Path):
    """(dotted name, line, is it at module level outside TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    lazy = set()
    for node in ast.walk(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if guarded or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                module = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}" if module == "drivekd" else module
                yield name, node.lineno, id(node) not in lazy


def violations(path: Path):
    package = package_of(path)
    if package in {"__init__", "__main__"}:
        return
    for name, line, eager in imports_of(path):
        head, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if head == "drivekd":
            target = rest[0] if rest else "the package itself"
            open_to_all = target == "errors" and package != "reference"
            if target not in ALLOWED.get(package, set()) | {package} and not open_to_all:
                yield where
        elif (head == "drivekd_kernels" and package != "ops") or package not in RESTRICTED.get(
            head, {package}
        ):
            yield where
        elif eager and (head, package) in LAZY_ONLY:
            yield f"{where} outside a function"


def test_every_import_goes_down():
    found = [v for p in sorted((ROOT / "drivekd").rglob("*.py")) for v in violations(p)]
    assert not found, "\n".join(found)


def test_kernels_import_only_torch_and_triton():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        heads = {name.split(".")[0] for name, _, _ in imports_of(path)}
        assert "drivekd" not in heads, path


def test_every_package_has_a_row():
    packages = {package_of(p) for p in (ROOT / "drivekd").rglob("*.py")}
    assert packages - {"__init__", "__main__"} <= set(ALLOWED)


def test_a_planted_upward_import_is_found(tmp_path, monkeypatch):
    planted = tmp_path / "drivekd" / "ops" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text("def f():\n    from drivekd.functional import attention_map_loss\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert list(violations(planted))


def test_import_module_is_used_in_two_places_only():
    """For backends, and for subpackages that `import drivekd` does not import."""
    for path in (ROOT / "drivekd").rglob("*.py"):
        if "import_module(" in path.read_text():
            own = path.relative_to(ROOT / "drivekd").as_posix()
            assert own in ("ops/dispatch.py", "__init__.py"), path


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would break `import transformers`"


@pytest.mark.parametrize("module", ["functional", "losses", "projection", "reweighting", "tokens"])
def test_core_imports_with_torch_alone(module, run_python):
    # torch itself imports triton where it is installed; the kernels stand for ours.
    code = (
        f"import drivekd.{module}, sys;"
        "heavy = {'transformers', 'drivekd_kernels', 'matplotlib', 'highway_env', 'accelerate'};"
        "bad = heavy & set(sys.modules);"
        "assert not bad, bad"
    )
    run_python(code)


def test_transformers_imports_from_the_repository_root(run_python):
    run_python("from transformers import AutoModelForCausalLM, Trainer")
