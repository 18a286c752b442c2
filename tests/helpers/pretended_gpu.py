"""The branches that only a GPU takes, gone through on the CPU: nothing is timed, no kernel runs."""

import pytest
import torch


class Event:
    """Every pair of events is 40 ms apart; the host is late as often as `late` says."""

    late = 0

    def __init__(self, enable_timing=False):
        self.recorded = False

    def record(self):
        self.recorded = True

    def query(self):
        assert self.recorded
        Event.late -= 1
        return Event.late >= 0

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, end):
        assert self.recorded and end.recorded
        return 40.0


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Modules of benchmarks take the CPU for a GPU; yields the calls of the profiler and sleeps."""
    jit = pytest.importorskip("triton.runtime.jit")
    from benchmarks import gpu, kernel_times
    from benchmarks.ceilings import clocks, measure

    if not isinstance(kernel_times.kernels.empty_kernel, jit.JITFunction):
        pytest.skip("kernels are interpreted: TRITON_INTERPRET=1")
    calls = []
    for module in (gpu, kernel_times, clocks, measure):
        monkeypatch.setattr(module, "DRY", False)
        monkeypatch.setattr(module, "DEVICE", "cpu", raising=False)
    monkeypatch.setattr(kernel_times, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", calls.append)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    facts = {"gpu": "NVIDIA H100", "arch": 90, "sms": 132, "l2_bytes": 2**20}
    for module in (measure, kernel_times):
        monkeypatch.setattr(module, "machine", facts.copy)
    monkeypatch.setattr(Event, "late", 0)
    return calls
