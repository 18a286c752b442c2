"""What a GPU can do at most, and what drivekd's kernels take of it (benchmarks/README.md)."""
