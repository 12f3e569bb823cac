"""python -m sparsekern.demo: the same as `sparsekern demo` (cli/demo.py)."""

import sys

from sparsekern.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
