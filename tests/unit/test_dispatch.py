"""The backend registry: what runs by name, what `auto` picks, and the reasons given."""

import pytest
import torch

from drivekd.errors import BackendUnavailableError
from drivekd.ops import dispatch

CPU = torch.device("cpu")


@pytest.fixture
def registry(monkeypatch):
    """An empty registry with every backend importable, and no environment override."""
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda backend: None)
    monkeypatch.delenv("DRIVEKD_BACKEND", raising=False)


def _fill(*backends, op="op", **limits):
    for backend in backends:
        dispatch.register(op, backend, **limits)(lambda backend=backend: backend)


def test_get_returns_what_was_registered(registry):
    _fill("torch", "native")
    assert dispatch.get("op", "torch")() == "torch"
    assert dispatch.get("op", "native")() == "native"


def test_a_pair_is_registered_once(registry):
    _fill("torch")
    with pytest.raises(ValueError, match="already has"):
        _fill("torch")


def test_registering_for_an_unknown_backend_is_refused(registry):
    with pytest.raises(ValueError, match="numpy"):
        dispatch.register("op", "numpy")


@pytest.mark.parametrize(
    ("device", "choice"), [("cpu", "native"), ("cuda", "triton"), ("xpu", "torch")]
)
def test_auto_follows_the_documented_table(registry, device, choice):
    _fill("torch", "native", "triton")
    picked = dispatch.resolve("op", "auto", device=torch.device(device), dtype=torch.float32)
    assert picked == choice


def test_auto_skips_a_backend_that_does_not_take_the_tensors(registry):
    _fill("torch")
    _fill("native", dtypes=(torch.float32,))
    assert dispatch.resolve("op", "auto", device=CPU, dtype=torch.float32) == "native"
    assert dispatch.resolve("op", "auto", device=CPU, dtype=torch.float64) == "torch"


def test_devices_may_be_known_only_once_the_backend_is_loaded(registry):
    known = ["cpu"]
    _fill("torch")
    _fill("native", devices=lambda: tuple(known))
    cuda = torch.device("cuda")
    assert dispatch.resolve("op", "auto", device=cuda, dtype=torch.float32) == "torch"
    known.append("cuda")
    assert dispatch.resolve("op", "auto", device=cuda, dtype=torch.float32) == "native"


def test_a_named_backend_never_becomes_another(registry):
    _fill("torch")
    _fill("native", dtypes=(torch.float32,))
    _fill("triton", devices=("cuda",))
    with pytest.raises(BackendUnavailableError, match="float64"):
        dispatch.resolve("op", "native", device=CPU, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="cpu tensors"):
        dispatch.resolve("op", "triton", device=CPU, dtype=torch.float32)


def test_a_named_backend_without_the_op_raises(registry):
    _fill("torch")
    with pytest.raises(BackendUnavailableError, match="no triton implementation"):
        dispatch.resolve("op", "triton", device=CPU, dtype=torch.float32)


def test_the_environment_replaces_auto_but_not_a_name(registry, monkeypatch):
    _fill("torch", "native")
    monkeypatch.setenv("DRIVEKD_BACKEND", "torch")
    assert dispatch.resolve("op", "auto", device=CPU, dtype=torch.float32) == "torch"
    assert dispatch.resolve("op", "native", device=CPU, dtype=torch.float32) == "native"


def test_the_environment_leaves_ops_alone_that_never_have_that_backend(registry, monkeypatch):
    _fill("torch", op="attention_map_loss")
    monkeypatch.setenv("DRIVEKD_BACKEND", "native")
    picked = dispatch.resolve("attention_map_loss", "auto", device=CPU, dtype=torch.float32)
    assert picked == "torch"


def test_the_environment_asking_for_a_missing_backend_raises(registry, monkeypatch):
    _fill("torch")
    monkeypatch.setenv("DRIVEKD_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match="triton"):
        dispatch.resolve("op", "auto", device=CPU, dtype=torch.float32)


def test_unknown_names_list_the_legal_ones(registry, monkeypatch):
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton', 'native'"):
        dispatch.resolve("op", "cuda", device=CPU, dtype=torch.float32)
    with pytest.raises(TypeError, match="backend must be a string"):
        dispatch.resolve("op", None, device=CPU, dtype=torch.float32)
    monkeypatch.setenv("DRIVEKD_BACKEND", "fast")
    with pytest.raises(ValueError, match="DRIVEKD_BACKEND"):
        dispatch.resolve("op", "auto", device=CPU, dtype=torch.float32)


def test_a_missing_extension_says_how_to_get_it():
    reason = dispatch._import_reason("drivekd.no_such_part", missing="build it", broken="rebuild")
    assert reason == "build it"


def test_an_extension_that_does_not_load_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_part.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = dispatch._import_reason("broken_part", missing="build it", broken="rebuild")
    assert "undefined symbol: x" in reason
    assert "rebuild" in reason


def test_torch_is_always_available():
    assert dispatch.unavailable_reason("torch") is None


def test_backend_info_names_every_op_backend_and_choice():
    info = dispatch.backend_info()
    assert {"attention_map", "attention_map_loss"} <= set(info)
    for entry in info.values():
        assert set(dispatch.BACKENDS) <= set(entry)
        assert entry["torch"] == "available"
        assert entry["auto on cpu"] in dispatch.BACKENDS
