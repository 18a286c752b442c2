"""`python -m benchmarks.ceilings FILE`: measure what this GPU can do at most."""

import sys
from pathlib import Path

from benchmarks.ceilings.measure import measure_all

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(min(1, measure_all(Path(sys.argv[1]))))
