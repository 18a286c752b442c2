"""Plain float64 twins of the fused ops: independent evidence, slow and large on purpose."""
