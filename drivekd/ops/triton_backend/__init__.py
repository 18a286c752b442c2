"""Backend of Triton kernels: chunks of rows streamed through one workspace (kernels/README.md)."""

from drivekd.ops.triton_backend import attention_map as attention_map  # registers
