"""Runs a Megatron-LM or Megatron-DeepSpeed training script, unpatched, with the `--pma-*` flags.

`torchrun ... -m pma_megatron.launch pretrain_gpt.py ARGS...` is `torchrun ... pretrain_gpt.py
ARGS...`, except that the functions averages hang on are decorated first.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from pma_megatron.errors import UsageError

USAGE = """usage: torchrun [TORCHRUN ARGS] -m pma_megatron.launch SCRIPT [ARGS...]

Run a training script of Megatron-LM or Megatron-DeepSpeed (pretrain_gpt.py, ...) with the --pma-*
flags added to its own. SCRIPT is run as torchrun would run it; every argument after it is the
script's. A SCRIPT outside of its tree needs that on PYTHONPATH. `SCRIPT --help` lists the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script given in `argv` (default: the command line) and return an exit code.

    The script's own exceptions and exits are left as they are.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    try:
        script = _script(given)
        _stand_in_for_python(script, given[1:])
        _install()
    except UsageError as error:
        rank = os.environ.get("RANK", "0")
        where = f"[rank {rank}] " if rank != "0" else ""
        sys.stderr.write(f"pma_megatron.launch: error: {where}{error}\n")
        return 2
    runpy.run_path(script, run_name="__main__")
    return 0


def _script(given: list[str]) -> str:
    if not given:
        raise UsageError(f"no script to run\n\n{USAGE}")
    if given[0].startswith("-"):
        raise UsageError(
            f"expected a script, found {given[0]!r}: torchrun's flags go before `-m "
            "pma_megatron.launch`, Megatron's after the script"
        )
    if not Path(given[0]).is_file():
        raise UsageError(
            f"there is no script {given[0]!r} in {Path.cwd()}: give the path to Megatron-LM's "
            "pretrain_gpt.py or your own"
        )
    return given[0]


def _stand_in_for_python(script: str, arguments: list[str]) -> None:
    """Set what `python SCRIPT` sets: the arguments, and the script's folder first on the path."""
    sys.argv[:] = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # -P, PYTHONSAFEPATH: nothing was put there
        sys.path[0] = str(Path(script).resolve().parent)


def _install() -> None:
    if not _importable("megatron.training"):
        found = importlib.util.find_spec("megatron.core") if _importable("megatron") else None
        only = " (megatron.core was found, but the megatron-core package has no training code)"
        raise UsageError(
            f"megatron.training cannot be imported{only if found else ''}: put the Megatron-LM "
            "tree first on PYTHONPATH, or run a script that lies in its top folder"
        )
    found = importlib.util.find_spec("megatron.training")
    if found is not None and found.submodule_search_locations is None:  # one file, no folder
        from pma_megatron.megatron_deepspeed.install import install
    else:
        from pma_megatron.megatron.install import install
    install()


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
