"""Calls on CUDA tensors that do not exist: what would mix devices, synchronise or copy on a GPU.

FakeTensorMode keeps devices, shapes and dtypes, and no data. `calls.py` runs in a process of its
own, because `device.cpp` must be loaded before torch.
"""
