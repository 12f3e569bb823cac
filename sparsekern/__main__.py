"""python -m sparsekern: the command line (cli/main.py)."""

import sys

from sparsekern.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
