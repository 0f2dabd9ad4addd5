"""`python -m nadam`, the command line."""

import sys

from nadam.cli import main

if __name__ == "__main__":
    sys.exit(main())
