"""Triton kernels of drivekd: tensors, strides and tiles; nothing about losses as users see them."""
