"""Targets of attention signals, made once and kept, so that training needs no teacher.

`keys` says what decides a target, `store` how targets lie on the disk, `targets` how training reads
them, `plan` and `fill` how a cache is sized and filled.
"""
