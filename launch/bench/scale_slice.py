"""Merge a slice of a model at the size of real jobs, with values in it, and compare the result.

    python launch/bench/scale_slice.py /tmp/scale --model 70b --ranks 2

Takes the run that `scale.py` writes, whose payload is holes, and gives every checkpoint of it shard
files of its own in which some tensors have values: all that are small, and one chunk of a large
one. Then `pma merge` of all its checkpoints on `--ranks` ranks, with all other tensors dropped:
planned over the whole model, averaged, verified and published. torch's own loader reads what it
wrote, and a float64 mean of the values that were written says what had to come out.
"""

from __future__ import annotations

import argparse
import math
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from scale import make_run
from scale_files import shape_of
from scale_models import MODELS

SMALL = "layer_norm_weight", "layernorm.weight"
LARGE = "output_layer.weight"
MAIN = "optimizer.state.param."


def values(key: str, iteration: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """Main params of a chunk in a checkpoint: float32, near each other from one to the next."""
    seed = zlib.crc32(key.encode())
    base = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    drift = torch.randn(sizes, generator=torch.Generator().manual_seed(seed + iteration))
    return base.mul_(0.02).add_(drift, alpha=0.002)


def filled(metadata: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys, chunks, and where they are stored, of the tensors that get values."""
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    for key, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue
        chunks = []
        if key.removeprefix(MAIN) == LARGE:
            chunks = entry.chunks[:1]
        elif key.endswith(SMALL) and (key.startswith(MAIN) or "optimizer" not in key):
            chunks = entry.chunks
        for chunk in chunks:
            yield key, chunk, places[key, chunk.offsets]


def own_file(path: Path, copied: set[Path]) -> None:
    """Make a hard link a file of its own, with the same holes."""
    if path in copied:
        return
    copied.add(path)
    subprocess.run(["cp", "--sparse=always", path, f"{path}.own"], check=True)
    Path(f"{path}.own").replace(path)


def fill(folder: Path) -> None:
    """Write values into a checkpoint: main params, and weights that are those rounded."""
    metadata: Any = pickle.loads((folder / ".metadata").read_bytes())  # of a run just made here
    iteration, copied = int(folder.name.removeprefix("iter_")), set[Path]()
    for key, chunk, info in filled(metadata):
        name = f"{key.removeprefix(MAIN)}{tuple(chunk.offsets)}"
        data = values(name, iteration, tuple(chunk.sizes))
        stored = data.to(metadata.state_dict_metadata[key].properties.dtype)
        payload = memoryview(stored.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        skeleton, _ = shape_of(tuple(chunk.sizes), stored.dtype)
        start, _ = skeleton.payloads["data/0"]
        around = skeleton.structure({"data/0": zlib.crc32(payload)})
        own_file(folder / info.relative_path, copied)
        with (folder / info.relative_path).open("r+b") as stream:
            for at, part in [*around, (start, payload)]:
                stream.seek(info.offset + at)
                stream.write(part)


def filled_run(folder: Path, model: str, count: int) -> Path:
    """The run with values, written where it is not there yet."""
    root = folder / f"{model}-slice-{count}"
    if not root.exists():
        sparse = make_run(folder, model, "fully_reshardable", count)
        begun = root.with_name(f"{root.name}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        subprocess.run(["cp", "-rl", sparse, begun], check=True)
        for checkpoint in sorted(begun.glob("iter_*")):
            fill(checkpoint)
        begun.rename(root)
    return root


def merged(root: Path, out: Path, ranks: int, count: int) -> float:
    """Merge what has values, and drop the rest; returns seconds."""
    newest = max(root.glob("iter_*"))
    metadata: Any = pickle.loads((newest / ".metadata").read_bytes())
    kept = {key for key, _, _ in filled(metadata)}
    tensors = [k for k, e in metadata.state_dict_metadata.items() if hasattr(e, "chunks")]
    others = [key for key in tensors if key not in kept and not key.startswith("optimizer.")]
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(ranks), "-m", "pma_megatron", "merge"]
    command += ["--load", str(root), "--save", str(out), "--last", str(count)]
    command += ["--optimizer-state", "drop", "--policy", *(f"{key}=drop" for key in others)]
    start_s = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start_s


def compare(root: Path, out: Path) -> int:
    """Elements that were compared with the mean of what was written.

    Raises:
        SystemExit: one is further from it than rounding to its dtype.
    """
    checkpoints = sorted(root.glob("iter_*"))
    (made,) = out.glob("iter_*")
    metadata: Any = pickle.loads((made / ".metadata").read_bytes())
    compared = 0
    state = {
        key: torch.full(entry.size, math.nan, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    dcp.load(state, checkpoint_id=str(made), no_dist=True)
    source: Any = pickle.loads((checkpoints[-1] / ".metadata").read_bytes())
    for key, chunk, _ in filled(source):
        if key.startswith(MAIN):
            continue
        name = f"{key}{tuple(chunk.offsets)}"
        numbers = [int(folder.name.removeprefix("iter_")) for folder in checkpoints]
        mean = torch.zeros(chunk.sizes, dtype=torch.float64)
        for number in numbers:
            mean += values(name, number, tuple(chunk.sizes)) / len(numbers)
        where = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        found = state[key][where].double()
        # What bfloat16 rounds, and what float32 rounds in the sum before it.
        bound = mean.abs() * (2.0**-8 + len(numbers) * 2.0**-23) + 2.0**-100
        if not bool(((found - mean).abs() <= bound).all()):
            raise SystemExit(f"{key} at {tuple(chunk.offsets)} is not the mean of what was written")
        state[key][where] = 0
        compared += chunk.sizes.numel()
    if any(bool(tensor.any()) for tensor in state.values()):
        raise SystemExit("something else than zeros came out where nothing was written")
    return compared


def main() -> None:
    """Parse the command line, write what is missing, merge, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="for runs and the output; some GiB for 70b")
    parser.add_argument("--model", choices=sorted(MODELS), default="70b")
    parser.add_argument("--count", type=int, default=2, help="checkpoints")
    parser.add_argument("--ranks", type=int, default=2)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    root = filled_run(chosen.folder, chosen.model, chosen.count)
    out = chosen.folder / f"{chosen.model}-slice-out"
    wall_s = merged(root, out, chosen.ranks, chosen.count)
    compared = compare(root, out)
    print(
        f"{chosen.model}, {chosen.count} checkpoints, {chosen.ranks} ranks: {compared} elements "
        "are the float64 mean of what was written, rounded, and all others are 0. The whole job "
        f"took {wall_s:.1f} s"
    )


if __name__ == "__main__":
    main()
