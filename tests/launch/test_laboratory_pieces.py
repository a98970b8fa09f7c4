"""The laboratory in pieces: work that stops when time is over, and goes on as if it had not."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

LAB = Path(__file__).parents[2] / "launch" / "experiments"
sys.path.insert(0, str(LAB))

import corpus  # noqa: E402
from lab import deadline, text  # noqa: E402
from lab.runs import Run, Start  # noqa: E402
from lab.text import DOMAINS  # noqa: E402
from lab.trainer import Rate  # noqa: E402
from lab.work import devices, missing, perform  # noqa: E402

from pma_megatron.testing import TinyConfig, run_ranks  # noqa: E402


def test_a_run_cut_into_pieces_is_the_run(monkeypatch, tmp_path):
    """Where nothing is saved for averages too: a piece ends with a checkpoint of its own."""
    records = []
    for name, over in (("whole", False), ("pieces", True)):
        monkeypatch.setenv("PMA_LAB", str(tmp_path / name))
        _short_texts(tmp_path / name)
        base = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=12, saves=(12,))
        run = replace(
            base,
            end=36,
            saves=(),
            scores=(15, 36),
            start=Start(run=base, iteration=12, optimizer_state="reset"),
        )
        pieces = 0
        while not run.is_done:
            run_ranks(_train_a_piece, 1, run, over)
            pieces += 1
        assert pieces == (3 if over else 1)  # steps 20 and 30 are looked at, then it ends
        assert not run.pieces.exists()
        assert sorted(path.name for path in run.root.glob("iter_*")) == []
        records.append(run.record())
        assert devices([run]) == ["CPU"]
    assert records[0] == records[1]
    assert len(records[0].losses) == 24 and set(records[0].scores) == {"15", "36"}


def _train_a_piece(rank, world_size, run, over):
    for each in missing([run]):
        deadline.stop_at(time.monotonic() if over and each is not run.after[0] else None)
        each.perform(rank)


@dataclass(frozen=True)
class Writes:
    file: Path
    ranks: int = 1
    own_process: bool = False
    after: tuple[Writes, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.file.exists()

    def perform(self, rank: int) -> None:
        self.file.touch()


def test_nothing_begins_when_time_is_over(tmp_path):
    first = Writes(tmp_path / "first")
    jobs = [first, Writes(tmp_path / "second", after=(first,))]
    assert perform(jobs, until_s=time.monotonic()) == jobs
    assert not list(tmp_path.iterdir())
    assert perform(jobs, until_s=time.monotonic() + 1e6) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_says_that_there_is_more_to_do(tmp_path):
    _short_texts(tmp_path / "lab")
    command = [LAB / "run.py", "count", "--scale", "ci", "--seeds", "1", "--minutes", "0"]
    done = subprocess.run(
        [sys.executable, *command, "--out", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PMA_LAB": str(tmp_path / "lab")},
    )
    assert done.returncode == 3, done.stderr[-2000:]
    assert "2 runs and scores are left" in done.stdout
    assert not (tmp_path / "results" / "count.jsonl").exists()


def test_runs_of_one_folder_are_of_one_text(monkeypatch, tmp_path):
    """Also where a run was made before texts were noted; and where there is none, any will do."""
    monkeypatch.setenv("PMA_LAB", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["corpus.py"])
    monkeypatch.setattr(corpus, "make", lambda folder, mirror: {})
    name = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=12).folder
    for own in ("prose.txt", "prose.train.txt", "legal.txt"):
        _short_texts(tmp_path)
        text.tokens.cache_clear()
        text.claim()
        assert corpus.main() == 0
        name.mkdir()
        text.claim()
        with pytest.raises(SystemExit):
            corpus.main()
        (tmp_path / "text" / own).write_text("another\n" * 5000)
        text.tokens.cache_clear()
        with pytest.raises(text.OtherTextError, match="were made with text"):
            text.claim()
        assert Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=12).folder == name
        name.rmdir()
        text.claim()
        (tmp_path / "text" / own).unlink()
    text.tokens.cache_clear()


def test_what_could_not_be_downloaded_replaces_no_text(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PMA_LAB", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["corpus.py", "--mirror", f"file://{tmp_path}/no-mirror"])
    monkeypatch.setattr(corpus, "SOURCES", {"django": "BSD-3-Clause"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for part in ("train", "validation", "test"):
        for domain in ("prose", "code"):
            (tmp_path / "text").mkdir(exist_ok=True)
            (tmp_path / "text" / f"{domain}.{part}.txt").write_text("as it was")
    assert corpus.main() == 1
    said = capsys.readouterr()
    assert "prose: 0.0 MB of text to train on, of at least 100" in said.err
    assert "django: not taken" in said.err and "python3.11-doc: not taken" in said.err
    files = [path for path in (tmp_path / "text").iterdir() if path.is_file()]
    assert len(files) == 6 and {path.read_text() for path in files} == {"as it was"}
    monkeypatch.setattr(corpus, "LEAST_BYTES", {"prose": 0, "code": 0})
    assert corpus.main() == 0
    assert (tmp_path / "text" / "prose.train.txt").read_text() == ""


def test_what_is_packed_is_read_once(tmp_path):
    """RFCs come as text and as HTML, packed; what comes as it is, is read too."""
    (tmp_path / "rfc793.txt.gz").write_bytes(gzip.compress(b"A host\fsends"))
    (tmp_path / "rfc793.html.gz").write_bytes(gzip.compress(b"<p>A host sends"))
    (tmp_path / "rfc793.json").write_text("{}")
    (tmp_path / "readme.html").write_text("<p>Read me")
    assert list(corpus.documents(tmp_path)) == ["Read me", "A host\fsends"]


def test_a_later_field_as_it_used_to_be_names_no_new_run():
    base = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=12)
    start = Start(run=base, iteration=12, last=2, every=3)
    fields = asdict(replace(base, start=start))
    assert fields.pop("optimizer") == fields["start"]["run"].pop("optimizer") == "adam"
    assert fields["start"].pop("method") == "sma"
    said = json.dumps([1, 8, fields], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    assert replace(base, start=start).folder.name.endswith(digest)
    other = replace(base, start=replace(start, method="1-sqrt"))
    assert other.folder != replace(base, start=start).folder


def _short_texts(lab):
    for domain in DOMAINS:
        lines = "".join(f"{domain} has line {line}.\n" for line in range(5000))
        (lab / "text").mkdir(parents=True, exist_ok=True)
        (lab / "text" / f"{domain}.txt").write_text(lines)
