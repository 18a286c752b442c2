"""The compiled CPU backend: `drivekd._C`, built from csrc/."""
