"""What drivekd's Triton kernels would do on a GPU, told without one (benchmarks/README.md)."""
