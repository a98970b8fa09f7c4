"""Run an experiment of the laboratory: train what it needs, score, plot, and write the page.

    python launch/experiments/run.py constant_lr               # one; `all` for every one
    python launch/experiments/run.py all --seeds 5 --scale small
    python launch/experiments/run.py --list
    python launch/experiments/run.py --page                    # docs/results.md from what is there
    python launch/experiments/run.py --draw all                # plots anew, of their rows
    python launch/experiments/run.py all --scale gpu --minutes 5    # a piece; exit code 3: more

Runs are kept in `$PMA_LAB` (default: a folder for temporary files) and shared by experiments; an
interrupted command goes on where it was. With `--minutes`, training stops at a checkpoint of its
own when time is over, and the same command goes on from there: on another day or card too, where
`$PMA_LAB` is copied. Rows say on what they were trained, processor and text; runs of one `$PMA_LAB`
are of one text. Rows and plots go to docs/results/.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TORCHDYNAMO_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent))

import claims
import torch
from lab import pages, text, work
from lab.experiment import Experiment, Results, seeds_of
from lab.kept import Kept
from lab.models import SCALES
from rich.console import Console

from pma_megatron.testing.cpu import DEVICE_ENV
from pma_megatron.version import __version__

DOCS = Path(__file__).parents[2] / "docs"
MORE = 3
"""Exit code where time was over before everything was done."""


def known() -> list[Experiment]:
    """Every experiment, in the order of the page."""
    modules = (info.name for info in pkgutil.iter_modules(claims.__path__))
    found = [importlib.import_module(f"claims.{name}").EXPERIMENT for name in sorted(modules)]
    return sorted(found, key=lambda experiment: claims.ORDER.index(experiment.name))


def run(
    experiment: Experiment,
    scale: str,
    seeds: int | None,
    folder: Path,
    cores: int | None = None,
    until_s: float | None = None,
) -> Results | None:
    """Do what is missing; rows and plot into `folder`. None if time was over before that."""
    start_s = time.monotonic()
    os.environ[DEVICE_ENV] = SCALES[scale].device
    chosen = seeds_of(seeds or experiment.seeds)
    jobs = experiment.jobs(SCALES[scale], chosen)
    missing = len(work.missing(jobs))
    if left := work.perform(jobs, cores, until_s):
        Console().print(f"{experiment.name}: time is over, {len(left)} runs and scores are left")
        return None
    about = {
        "command": f"python launch/experiments/run.py {experiment.name}"
        + (f" --seeds {seeds}" if seeds else "")
        + ("" if scale == "tiny" else f" --scale {scale}"),
        "pma": next((job.typed() for job in jobs if isinstance(job, Kept)), []),
        "work": {
            "jobs": missing,
            "cores": cores or os.cpu_count(),
            "s": time.monotonic() - start_s,
        },
        "scale": scale,
        "seeds": len(chosen),
        "text": text.digest(),
        "devices": work.devices(jobs),
        "versions": f"pma-megatron {__version__}, megatron-core {version('megatron-core')}, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    results = Results(about=about, rows=list(experiment.rows(SCALES[scale], chosen)))
    results.write(pages.rows_file(folder, experiment))
    pages.draw(experiment, results, folder)
    Console().print(pages.section(experiment, results), markup=False, highlight=False)
    Console().print(f"{experiment.name}: {time.monotonic() - start_s:.0f} s")
    return results


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    everything = known()
    names = [experiment.name for experiment in everything]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, help="how many (default: the experiment's own)")
    parser.add_argument("--scale", choices=sorted(SCALES), default="tiny")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of results.md and results/")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    parser.add_argument("--draw", action="store_true", help="only draw plots and page anew")
    parser.add_argument("--cores", type=int, help="how many to use (default: all)")
    parser.add_argument(
        "--minutes", type=float, help=f"stop after so many; exit code {MORE} if there is more to do"
    )
    chosen = parser.parse_args(words)
    if chosen.list:
        for experiment in everything:
            print(f"{experiment.name:18} {experiment.title}")
        return 0
    if not chosen.names and not chosen.page:
        parser.error("name an experiment, or `all`; --list says which there are")
    unknown = sorted({*chosen.names} - {*names, "all"})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}, all")
    until_s = None if chosen.minutes is None else time.monotonic() + 60 * chosen.minutes
    folder, code = chosen.out / "results", 0
    if not chosen.draw:
        text.prepare()
    if chosen.names and not chosen.draw:
        try:
            text.claim()
        except text.OtherTextError as error:
            parser.error(str(error))
    for experiment in everything:
        if "all" not in chosen.names and experiment.name not in chosen.names:
            continue
        if chosen.draw:
            pages.draw(experiment, Results.read(pages.rows_file(folder, experiment)), folder)
        elif run(experiment, chosen.scale, chosen.seeds, folder, chosen.cores, until_s) is None:
            code = MORE
            break
    (chosen.out / "results.md").write_text(pages.page(everything, folder))
    return code


if __name__ == "__main__":
    sys.exit(main())
