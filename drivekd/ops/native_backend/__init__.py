"""The compiled backend: `drivekd._C`, built from csrc/."""
