"""`python -m torchlocal`: the same as the `torchlocal` command."""

import sys

from torchlocal.cli import main

if __name__ == "__main__":
    sys.exit(main())
