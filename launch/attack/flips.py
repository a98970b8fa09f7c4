"""Flip single bits in what a merge reads, and count what it publishes.

    python launch/attack/flips.py --flips 500 --work /tmp/flips

Real tiny runs, of every layout that Megatron, DeepSpeed and FSDP2 save here. For each
flip one record of one source is drawn, by its bytes or (every other time) each alike, one of its
bits is turned, and the merge of all sources is made in this process; then the bit is put back.
Files and records are found by `.metadata` as torch reads it and by `zipfile`, not by the package.

A merge that is published although a bit is wrong is `unchanged` if every file of it, `pma.json`
aside, is the one that undamaged sources give: no output depends on that bit. Else it is `wrong`.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed.checkpoint as dcp

from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.errors import PmaError
from pma_megatron.testing import TinyConfig, run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from pma_megatron.testing.tiny_fsdp import STYLES, FsdpConfig
from runs import digests, flipped, report, to_universal, train_deepspeed, train_fsdp, train_megatron

_DENSE = TinyConfig()
_MOE = replace(_DENSE, num_experts=4)
MEGATRON = {
    "dp_reshardable": _DENSE,
    "dp_reshardable in buckets": replace(_DENSE, bucket_size=4000),
    "fully_reshardable": replace(_DENSE, optim_format="fully_reshardable"),
    "float16 optimizer": replace(_DENSE, use_distributed_optimizer=False),
    "tensor parallel": replace(_DENSE, tensor_model_parallel_size=2),
    "pipeline parallel": replace(_DENSE, pipeline_model_parallel_size=2),
    "expert parallel": replace(_MOE, expert_model_parallel_size=2),
}
GOLDEN = (
    "0.14.0-dp_zero_gather_scatter-dense",
    "0.14.0-fully_sharded_model_space-dense",
    "0.14.0-fully_sharded_model_space-tp2",
)
"""Runs of a release that saved layouts which the present one does not, kept for the tests."""
DEEPSPEED = {
    "ZeRO-1": DeepSpeedConfig(stage=1),
    "ZeRO-2": DeepSpeedConfig(stage=2),
    "ZeRO-3": DeepSpeedConfig(stage=3),
}
FSDP = {f"FSDP2 as {style} saves": FsdpConfig(style=style) for style in STYLES}
UNIVERSAL = ("ZeRO-1", "ZeRO-3")
MIXED = ("tensor parallel", "dp_reshardable")
"""Sources of two layouts: parts of rows are read of the first."""


@dataclass(frozen=True)
class Case:
    """Sources, oldest first, and what becomes of the moments."""

    name: str
    sources: tuple[Path, ...]
    optimizer_state: str

    def request(self, save: Path) -> MergeRequest:
        """Their merge."""
        return MergeRequest(
            load=str(self.sources[-1].parent),
            save=str(save),
            selection=SelectionRequest(paths=tuple(map(str, self.sources))),
            policy=Policy(optimizer_state=self.optimizer_state),
        )


@dataclass(frozen=True)
class Place:
    """One record of a zip: `nbytes` from byte `start` of `file`."""

    file: Path
    start: int
    nbytes: int


def make_cases(folder: Path, fsdp_alone: bool) -> list[Case]:
    """Train everything below `folder`, or what FSDP2 trains."""
    run_ranks(train_fsdp, 2, {str(folder / name): c for name, c in FSDP.items()}, timeout_s=900)
    if fsdp_alone:
        return _with_moments(folder, FSDP)
    run_ranks(
        train_megatron, 2, {str(folder / name): c for name, c in MEGATRON.items()}, timeout_s=900
    )
    run_ranks(
        train_deepspeed, 2, {str(folder / name): c for name, c in DEEPSPEED.items()}, timeout_s=900
    )
    universal = {str(folder / name): str(folder / f"Universal of {name}") for name in UNIVERSAL}
    run_ranks(to_universal, 1, universal, init=False, timeout_s=900)
    for name in GOLDEN:
        archive = Path(__file__).parents[2] / "tests" / "golden" / f"{name}.tar.xz"
        shutil.unpack_archive(archive, folder / name)
    converted = (f"Universal of {name}" for name in UNIVERSAL)
    cases = _with_moments(folder, [*MEGATRON, *GOLDEN, *DEEPSPEED, *converted, *FSDP])
    older, newest = (sources_of(folder / name) for name in MIXED)
    return [*cases, Case(" then ".join(MIXED), (older[0], newest[1]), "latest")]


def _with_moments(folder: Path, roots: Iterable[str]) -> list[Case]:
    return [
        Case(name, tuple(sources_of(folder / name)), state)
        for name in roots
        for state in ("latest", "average")
    ]


def sources_of(root: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    kept = [path for path in root.rglob("iter_*") if path.is_dir()]
    folders = kept or [path for path in root.iterdir() if path.is_dir()]
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def places_of(source: Path) -> list[Place]:
    """Every record of every zip of a checkpoint."""
    found = []
    for part in (file.parent for file in sorted(source.rglob(".metadata"))):
        metadata = dcp.FileSystemReader(part).read_metadata()
        for info in metadata.storage_data.values():
            found += _records(part / info.relative_path, info.offset, info.length)
    for file in sorted(source.rglob("*.pt")):
        found += _records(file, 0, file.stat().st_size)
    return found


def _records(file: Path, offset: int, length: int) -> Iterator[Place]:
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(length)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            at = info.header_offset
            names = int.from_bytes(data[at + 26 : at + 28], "little")
            extra = int.from_bytes(data[at + 28 : at + 30], "little")
            if info.file_size:
                yield Place(file, offset + at + 30 + names + extra, info.file_size)


def attack(case: Case, flips: int, draw: random.Random, scratch: Path) -> Counter[str]:
    """What became of `flips` merges: how they were refused, or what was published."""
    save, outcomes = scratch / "merged", Counter[str]()
    places = [place for source in case.sources for place in places_of(source)]
    right = _published(case, save)
    for number in range(flips):
        weights = [place.nbytes for place in places] if number % 2 == 0 else None
        (place,) = draw.choices(places, weights)
        byte, bit = place.start + draw.randrange(place.nbytes), draw.randrange(8)
        with flipped(place.file, byte, bit):
            try:
                found = _published(case, save)
            except PmaError as error:
                damaged = "CRC-32" in str(error) and place.file.name in str(error)
                outcomes["named" if damaged else f"refused: {type(error).__name__}"] += 1
                continue
        outcomes["unchanged" if found == right else "wrong"] += 1
        if found != right:
            print(f"WRONG: {case.name}, {place}, byte {byte}, bit {bit}", file=sys.stderr)
    return outcomes


def _published(case: Case, save: Path) -> dict[str, str]:
    shutil.rmtree(save, ignore_errors=True)
    try:
        (output,) = merge(case.request(save)).outputs
        files = digests(Path(output))
        return {name: files[name] for name in files if not name.startswith("pma.json")}
    except PmaError:
        assert not list(save.glob("[!.]*")), f"{save} was published in spite of an error"
        raise


def main() -> int:
    """Attack every case; 0 if no merge was published wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--flips", type=int, default=500, help="in all (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs; removed first")
    parser.add_argument("--fsdp", action="store_true", help="runs of FSDP2 alone")
    chosen = parser.parse_args()
    shutil.rmtree(chosen.work, ignore_errors=True)
    cases, draw = make_cases(chosen.work / "runs", chosen.fsdp), random.Random(chosen.seed)
    total: Counter[str] = Counter()
    for number, case in enumerate(cases):
        share = chosen.flips * (number + 1) // len(cases) - chosen.flips * number // len(cases)
        outcomes = attack(case, share, draw, chosen.work / "scratch")
        said = f"{case.name}, moments {case.optimizer_state}: {dict(outcomes)}"
        print(said, file=sys.stderr, flush=True)
        total += outcomes
    shutil.rmtree(chosen.work)
    return report({"flips": chosen.flips, **total}, good=not total["wrong"])


if __name__ == "__main__":
    sys.exit(main())
