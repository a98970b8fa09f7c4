"""The `pma` command as a rank of a job whose ranks begin together, whatever each of them imports.

    torchrun ... together.py FOLDER RANKS merge --load ...

Ranks meet in FOLDER once all that takes seconds is imported; what they wait for each other
afterwards is what the command itself lets them wait.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pma_megatron.cli.asked
import pma_megatron.cli.command
import pma_megatron.cli.flags
import pma_megatron.merging.job  # noqa: F401 (as all of these: to have it)
from pma_megatron.cli import main

if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < ranks:
        time.sleep(0.01)
    sys.argv[1:] = sys.argv[3:]
    sys.exit(main())
