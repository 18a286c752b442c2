"""Where students train and how many at a time, on machines with and without a GPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from drivekd.demo.devices import choose_device, default_workers, device_name


@pytest.fixture
def gpu(monkeypatch):
    """A machine of 16 cores whose GPU has 7 GiB."""
    properties = SimpleNamespace(total_memory=7 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def test_a_gpu_is_used_unless_the_cpu_is_asked_for(gpu):
    assert [choose_device(each) for each in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert [device_name(each) for each in ("cuda", "cpu")] == ["Some GPU", "cpu"]


def test_workers_fit_into_cores_and_into_the_gpus_memory(gpu, monkeypatch):
    assert default_workers("cpu") == 16
    assert default_workers("cuda") == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert default_workers("cuda") == 2


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
