"""`python -m drivekd`: the same as the `drivekd` command."""

from drivekd.cli.command import command

if __name__ == "__main__":
    command()
