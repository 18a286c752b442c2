"""Backend of Triton kernels: attention maps in chunks of rows, gradients through pointer tables."""

from drivekd.ops.triton_backend import attention_map as attention_map  # registers
from drivekd.ops.triton_backend import gradient as gradient
