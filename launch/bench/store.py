"""Times a merge from an object store to it against the library's own download and upload.

Plain: every byte of the sources by ranged requests of the same size, as many in flight, thrown
away; then the output's files, put as files in parts of the same size. Rounds are interleaved, and
every merge begins with nothing fetched. Without --address a server of S3 on loopback (moto, a
process of its own) holds the checkpoints: it works in one Python thread, and copies an object for
every range of it, so files of it should be small. Requests are counted by operation of the store; a
file that is put in parts counts as the requests that it takes.

    python launch/bench/make_checkpoints.py /tmp/bench/w128 --kind weights --mib 128 --count 4
    python launch/bench/store.py /tmp/bench/w128 --last 4 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import obstore
from obstore.store import from_url

from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge
from pma_megatron.storage import spool
from pma_megatron.storage.addresses import Address
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.protocol import IN_FLIGHT, ONE_PUT_BYTES, PART_BYTES

PORT = 5597
_FILES_AT_ONCE = 4
SERVER = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
}


def main() -> None:
    """Measure, and print a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="checkpoints on a disk, which are copied there")
    parser.add_argument("--address", help="a folder in a store, e.g. s3://bucket/bench")
    parser.add_argument("--last", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    server = None if arguments.address else started()
    logging.disable(logging.WARNING)  # checkpoints of random numbers are no run
    try:
        measured(arguments, arguments.address or "s3://bench/store")
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def started() -> subprocess.Popen[bytes]:
    """A server of S3 with a bucket."""
    os.environ.update(SERVER)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(150):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT)):
            break
        time.sleep(0.2)
    import boto3

    client = boto3.client("s3", endpoint_url=SERVER["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="bench")
    return server


def measured(arguments: argparse.Namespace, address: str) -> None:
    """Copy the checkpoints there, and time both ways in turn."""
    found = Address.of(address)
    assert found is not None
    store = from_url(f"{found.scheme}://{found.bucket}")
    refs = list_checkpoints(arguments.run)[-arguments.last :]
    folders = [Path(ref.path) for ref in refs]
    names = {
        f"{found.key}/run/{path.relative_to(arguments.run)}": path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for key, path in names.items():
        obstore.put(store, key, path)
    sizes = {key: path.stat().st_size for key, path in names.items()}
    print(f"{len(folders)} sources, {len(sizes)} files, {sum(sizes.values()) / 2**20:.0f} MiB")
    request = MergeRequest(
        load=f"{address}/run",
        save=f"{address}/merged",
        selection=SelectionRequest(last=arguments.last),
        threads=arguments.threads,
    )
    output = Path(tempfile.mkdtemp())
    made = merge(request).outputs[0]
    prefix = made.removeprefix(f"{found.scheme}://{found.bucket}/")
    kept = {}
    for batch in obstore.list(store, prefix=prefix):
        for number, each in enumerate(batch):
            kept[each["path"]] = output / f"{number}"
            kept[each["path"]].write_bytes(obstore.get(store, each["path"]).bytes())
    rows = []
    for number in range(arguments.rounds):
        begin_s = time.perf_counter()
        download(store, sizes)
        down_s = time.perf_counter() - begin_s
        upload(store, {key.replace(prefix, f"{found.key}/plain"): p for key, p in kept.items()})
        plain_s = time.perf_counter() - begin_s
        spool.forget()
        begin_s = time.perf_counter()
        with counted() as asked:  # into a folder of its own: `overwrite` looks at what is there
            report = merge(replace(request, save=f"{address}/merged-{number}"))
        merge_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        merge(replace(request, load=str(arguments.run), save=str(output / f"disk-{number}")))
        disk_s = time.perf_counter() - begin_s
        stages = ", ".join(f"{name} {value:.2f}" for name, value in report.seconds.items())
        rows.append(merge_s / plain_s)
        print(
            f"round {number + 1}: plain {plain_s:.2f} s (down {down_s:.2f}), "
            f"merge {merge_s:.2f} s ({stages}), ratio {rows[-1]:.2f}, on a disk {disk_s:.2f} s, "
            f"peak memory {max(report.peak_memory_above_baseline_bytes) / 2**20:.0f} MiB"
        )
        lengths = [path.stat().st_size for path in kept.values()]
        plain = Counter(
            get=parts_of(sizes.values()),
            put=sum(1 if n <= PART_BYTES else parts_of([n]) + 2 for n in lengths),
        )
        print(f"  requests of plain: {told(plain)}; of the merge: {told(asked)}")
    print(f"ratio {statistics.median(rows):.2f} ({min(rows):.2f} to {max(rows):.2f})")
    shutil.rmtree(output)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests of this process to stores in the block, by kind."""
    asked: Counter[str] = Counter()
    kinds = {"listed": "list", "beside": "list", "head": "head", "got": "get", "read": "get"}
    real = {name: getattr(ObjectStore, name) for name in (*kinds, "put", "put_file", "delete")}

    def counting(name: str) -> Callable[..., object]:
        def called(self: ObjectStore, *given: object, **how: object) -> object:
            sized = name == "put_file" and isinstance(given[1], Path)
            count = puts(Path(str(given[1])).stat().st_size) if sized else 1
            asked[kinds.get(name, name.removesuffix("_file"))] += count
            return real[name](self, *given, **how)

        return called

    try:
        for name in real:
            setattr(ObjectStore, name, counting(name))
        yield asked
    finally:
        for name, method in real.items():
            setattr(ObjectStore, name, method)


def parts_of(sizes: Iterable[int]) -> int:
    """Requests of `PART_BYTES` that files of these sizes take."""
    return sum(max(1, -(-nbytes // PART_BYTES)) for nbytes in sizes)


def puts(nbytes: int) -> int:
    """Requests that put a file there: its parts, and two that begin and end them."""
    return 1 if nbytes <= ONE_PUT_BYTES else parts_of([nbytes]) + 2


def told(asked: Counter[str]) -> str:
    """Requests in words."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(asked.items()))
    return f"{asked.total()} ({kinds})"


def download(store: object, sizes: dict[str, int]) -> None:
    """Every byte of some objects, by ranges, thrown away."""
    parts = [
        (key, start, min(PART_BYTES, size - start))
        for key, size in sizes.items()
        for start in range(0, size, PART_BYTES)
    ]
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(lambda p: obstore.get_range(store, p[0], start=p[1], length=p[2]), parts):
            pass


def upload(store: object, files: dict[str, Path]) -> None:
    """Files, several at once, as the library puts them by itself, in parts of the same size."""

    def put(key: str) -> None:
        obstore.put(store, key, files[key], chunk_size=PART_BYTES)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for _ in pool.map(put, files):
            pass


if __name__ == "__main__":
    main()
