"""The laboratory: statistics, what is remembered between calls, and directions that must hold."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAB = ROOT / "launch" / "experiments"
sys.path.insert(0, str(LAB))

import corpus  # noqa: E402
from lab.command import CommandFailedError, pma  # noqa: E402
from lab.experiment import Results, Table, groups  # noqa: E402
from lab.runs import Run, Start  # noqa: E402
from lab.stats import NOT_REPRODUCED, REPRODUCED, UNDECIDED, estimate, verdict  # noqa: E402
from lab.text import DOMAINS, tokens  # noqa: E402
from lab.trainer import LabTrainer, Rate  # noqa: E402
from lab.work import _batches, missing, perform  # noqa: E402

from pma_megatron.testing import RankFailure, TinyConfig, run_ranks  # noqa: E402


def test_a_corpus_has_every_document_in_one_part_alone(monkeypatch, tmp_path):
    """Pages as words; what says the same once; and the parts are what the laboratory reads."""
    pages = tmp_path / "files/doc"
    pages.mkdir(parents=True)
    for number in range(200):
        body = f"<p>Page {number} <b>says</b> this.</p><script>var no;</script>" * 40
        (pages / f"{number}.html").write_text(f"<head><title>none</title></head>{body}")
    (pages / "again.html").write_text((pages / "0.html").read_text())
    (pages / "short.txt").write_text("too short")
    monkeypatch.setenv("PMA_LAB", str(tmp_path))
    (tmp_path / "text").mkdir()
    taken = corpus.Taken(tmp_path / "text", "prose")
    taken.add(corpus.documents(tmp_path / "files"))
    taken.publish()
    tokens.cache_clear()
    parts = [bytes(tokens("prose", part).numpy()).decode() for part in taken.nbytes]
    tokens.cache_clear()
    numbers = [set(re.findall(r"Page (\d+) says this", text)) for text in parts]
    assert set.union(*numbers) == {str(number) for number in range(200)}
    assert sum(map(len, numbers)) == 200 and len(numbers[0]) > 150
    assert "".join(parts).count("Page 0 says this.") == 40
    assert not any(word in "".join(parts) for word in ("var no", "none", "<p>", "too short"))


def test_an_interval_is_students_t():
    found = estimate([1.0, 2.0, 4.0])
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert found.mean == pytest.approx(7 / 3)
    assert found.margin == pytest.approx(4.303 * deviation / math.sqrt(3))  # t, 2 degrees, 97.5 %
    assert estimate([5.0]).low == -math.inf


def test_a_verdict_needs_whole_intervals():
    sure, unsure, against = estimate([1.0, 1.1]), estimate([-0.5, 0.6]), estimate([-1.0, -1.01])
    assert sure.low > 0 > unsure.low and unsure.high > 0 > against.high
    assert verdict([sure]) == REPRODUCED
    assert verdict([sure, unsure]) == UNDECIDED
    assert verdict([sure, unsure, against]) == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("rate", "iteration", "expected"),
    [
        (Rate(peak=2.0, warmup=4), 0, 0.5),
        (Rate(peak=2.0, warmup=4), 4, 2.0),
        (Rate(peak=2.0, begin=100, warmup=4), 101, 1.0),
        (Rate(peak=2.0, decay="linear", decay_begin=10, decay_end=20), 9, 2.0),
        (Rate(peak=2.0, decay="linear", decay_begin=10, decay_end=20), 15, 1.0),
        (Rate(peak=2.0, decay="linear", decay_begin=10, decay_end=20), 25, 0.0),
        (Rate(peak=2.0, decay="cosine", decay_begin=0, decay_end=10, floor=1.0), 5, 1.5),
    ],
)
def test_learning_rates(rate, iteration, expected):
    assert rate.at(iteration) == pytest.approx(expected)


def test_a_run_is_known_by_all_that_decides_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PMA_LAB", str(tmp_path))
    run = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=10, saves=(5, 10))
    fork = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=12, start=Start(run=run, iteration=5))
    other = Run(config=TinyConfig(seed=2), rate=Rate(peak=1e-2), end=10, saves=(5, 10))
    assert len({run.folder, fork.folder, other.folder}) == 3
    assert missing([fork, run, other]) == [run, fork, other], "what a fork needs comes first"
    run.folder.mkdir(parents=True)
    (run.folder / "record.json").write_text("{}")
    assert missing([fork, run]) == [fork]


@dataclass(frozen=True)
class Job:
    number: int
    ranks: int = 1
    own_process: bool = False
    after: tuple[Job, ...] = ()
    is_done: bool = False


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_work_fits_the_cores_and_keeps_its_order(cores):
    first = Job(0, ranks=2, own_process=True)
    waiting = [first, Job(1, ranks=2, after=(first,)), *(Job(n) for n in range(2, 30))]
    running, done, busiest = {}, [], 0
    while waiting or running:
        for batch in list(_batches(waiting, running, cores)):
            assert all(other in done for job in batch for other in job.after)
            waiting = [job for job in waiting if job not in batch]
            running[len(done) + len(running)] = batch
        used = sum(batch[0].ranks for batch in running.values())
        assert used <= cores or len(running) == 1, "a job that needs more cores runs alone"
        busiest = max(busiest, used)
        done += running.pop(min(running))
    assert sorted(job.number for job in done) == list(range(30))
    assert busiest >= cores


@dataclass(frozen=True)
class FailsOften:
    folder: Path
    failures: int
    ranks: int = 1
    own_process: bool = True
    after: tuple[Job, ...] = ()

    @property
    def is_done(self) -> bool:
        return (self.folder / "done").exists()

    def perform(self, rank: int) -> None:
        tried = len(list(self.folder.iterdir()))
        (self.folder / ("done" if tried == self.failures else f"try{tried}")).touch()
        if tried < self.failures:
            raise ValueError("no luck")


def test_work_that_fails_is_tried_once_more_and_said(tmp_path, capsys):
    (tmp_path / "once").mkdir()
    perform([FailsOften(tmp_path / "once", failures=1)])
    assert (tmp_path / "once" / "done").exists()
    assert "no luck" in capsys.readouterr().err
    (tmp_path / "twice").mkdir()
    with pytest.raises(RankFailure, match="no luck"):
        perform([FailsOften(tmp_path / "twice", failures=2)])


def test_a_command_that_is_refused_says_so(tmp_path):
    with pytest.raises(CommandFailedError, match=r"(?s)pma merge --load .*merge needs --save"):
        pma(["merge", "--load", str(tmp_path)])
    with pytest.raises(CommandFailedError, match="exit code 2"):
        pma(["merge", "--no-such-flag"])


def test_a_score_leaves_the_validation_text_in_place(monkeypatch, tmp_path):
    monkeypatch.setenv("PMA_LAB", str(tmp_path))
    _short_texts(tmp_path)
    ((before, losses, after),) = run_ranks(_evaluate_around_a_score, 1)
    assert before == losses["validation"] == after
    assert len({*losses.values()}) == len(losses), "every part has a loss of its own"


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path):
    records = []
    for name, steps in (("whole", None), ("cut", 7)):
        monkeypatch.setenv("PMA_LAB", str(tmp_path / name))
        _short_texts(tmp_path / name)
        run = Run(config=TinyConfig(), rate=Rate(peak=1e-2), end=9, saves=(3, 6), scores=(2, 5, 8))
        if steps is not None:
            with pytest.raises(RankFailure, match="no more steps"):
                run_ranks(_train_for, 1, run, steps)
            assert not run.is_done
            assert (run.root / "latest_checkpointed_iteration.txt").read_text() == "6"
        run_ranks(_train_for, 1, run, None)
        records.append(run.record())
    assert records[0] == records[1]
    assert len(records[0].losses) == 9 and set(records[0].scores) == {"2", "5", "8"}


def _short_texts(lab):
    for domain in DOMAINS:
        text = "".join(f"{domain} has line {line}.\n" for line in range(5000))
        (lab / "text").mkdir(parents=True, exist_ok=True)
        (lab / "text" / f"{domain}.txt").write_text(text)


def _train_for(rank, world_size, run, steps):
    """Perform `run`; be cut off after so many steps."""
    left = iter(range(steps if steps is not None else 1_000_000))
    train = LabTrainer.train

    def counted(self, count):
        if next(left, None) is None:
            raise InterruptedError("no more steps")
        return train(self, count)

    LabTrainer.train = counted
    run.perform(rank)


def _evaluate_around_a_score(rank, world_size):
    trainer = LabTrainer(TinyConfig())
    found = trainer.evaluate(1), trainer.losses(1), trainer.evaluate(1)
    trainer.close()
    return found


def test_rows_are_kept_as_json_lines(tmp_path):
    rows = [{"seed": 1, "gain": 0.5}, {"seed": 2, "gain": 0.25}]
    Results(about={"scale": "tiny"}, rows=rows).write(tmp_path / "x.jsonl")
    assert Results.read(tmp_path / "x.jsonl") == Results(about={"scale": "tiny"}, rows=rows)
    assert [key for key, _ in groups(rows, "seed")] == [(1,), (2,)]
    assert Table(columns=["a", "b"], rows=[[1, "x"]]).markdown().splitlines()[2] == "| 1 | x |"


def test_the_page_is_what_its_rows_say():
    found = subprocess.run(
        [sys.executable, "-c", _PAGE], capture_output=True, text=True, check=True, cwd=LAB
    )
    assert (ROOT / "docs" / "results.md").read_text() == found.stdout, "run.py --page"


_PAGE = """
import sys, run
from lab import pages
sys.stdout.write(pages.page(run.known(), run.DOCS / "results"))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_merging_helps_late_and_reaching_far_back_hurts_early(tmp_path):
    """The robust directions of the paper, at the smallest scale: see docs/results.md for how much
    more they show at a larger one."""
    command = [LAB / "run.py", "count", "--scale", "ci", "--seeds", "2", "--out", tmp_path]
    own = {**os.environ, "PMA_LAB": str(tmp_path / "lab")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=own, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "results" / "count.jsonl").open()][1:]
    gains = {(r["when"], r["last"], r["seed"]): r["gain"] for r in rows}
    kept = [json.loads(path.read_text()) for path in (tmp_path / "lab").rglob("evaluate-*.json")]
    assert [scores["scores_version"] for scores in kept] == [1, 1], "what `pma evaluate` wrote"
    for seed in (1, 2):
        assert gains["late", 6, seed] > 0.01, "merging helps"
        assert gains["early", 15, seed] < gains["early", 3, seed] - 0.05, "old weights hurt"
    assert (tmp_path / "results" / "count.png").stat().st_size > 10_000
    assert "How many checkpoints" in (tmp_path / "results.md").read_text()
