"""`python -m pma_megatron`: the `pma` command."""

import sys

from pma_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
