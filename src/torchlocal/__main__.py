"""`python -m torchlocal`: the same as the `torchlocal` command."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command; Ctrl-C is one line from the first import on."""
    try:
        from torchlocal.cli.commands import main as run
    except KeyboardInterrupt:
        print("torchlocal: Interrupted.", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
