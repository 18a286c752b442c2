"""`python -m drivekd`: the same as the `drivekd` command."""

import sys

from drivekd.cli import main

if __name__ == "__main__":
    sys.exit(main())
