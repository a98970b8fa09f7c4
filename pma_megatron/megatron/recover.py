"""Recovery from a loss spike while training goes on, for any Megatron training loop.

    recovery = Recovery(models, optimizer, roots=[save], rollback=load_my_checkpoint)
    recovery.resumed(iteration, recoveries, state)        # after a resume, with what was saved
    for iteration in ...:
        ...                                               # forward, backward, optimizer.step()
        recovery.step(iteration, loss, grad_norm)         # None on ranks that have no loss
        if save_now:
            ...  # store recovery.recoveries and recovery.state_dict() with the checkpoint

Every rank makes every call, and all act in the same iteration. On a confirmed spike the trainer's
own load brings back the newest healthy checkpoint (weights, main params, moments), and the average
of the healthy ones replaces weights and main params. Iteration, data and LR schedule move on, so
the data that the run broke on does not come again. Nothing on disk changes but the log
(`recovery_log.FILE`); a crash at any point leaves checkpoints of which the log says which are
spoiled.

The `--pma-recover` flags drive the same class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.errors import CheckpointError, PmaError, SelectionError
from pma_megatron.live.poison import cure, poisoned_on_failure
from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.load import merge_into, trainer_of
from pma_megatron.megatron.replicas import forward_hooks_off
from pma_megatron.runs import recovery_log
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.gaps import lines
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.spikes.detector import SpikeDetector
from pma_megatron.spikes.healthy import Healthy, HealthyRequest, Span, choose_healthy

Rollback = Callable[[CheckpointRef], Any]
"""Loads one full checkpoint into model and optimizer, and leaves everything else as it is."""
Told = Callable[[Mapping[str, Any]], None]
"""Gets every event of the recovery log when it is in there."""

_NOT_KNOWN = (
    "iteration {iteration} was resumed, and {root} has a spike that began at iteration {onset} in "
    "its log of recoveries. Whether the checkpoint was saved in it or after the recovery from it "
    "is not known ({why}), so nothing was done. If `pma list` calls an earlier checkpoint "
    "complete, resume from that. If you know that this one is healthy, move "
    f"{recovery_log.FILE} to another place first: from then on no checkpoint counts as spoiled"
)


class RecoverySpentError(PmaError):
    """The run spiked again and again, or has no healthy checkpoint: a person must look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """What a recovery did.

    Attributes:
        number: of the spike, in the log.
        onset: first iteration that was off.
        iteration: after which it was done.
        attempt: from 1.
        sources: folders that were averaged, oldest first.
        untrusted_since: first iteration after which weights are not to be used: the onset, or the
            recovery before it if no loss was judged in between.
    """

    number: int
    onset: int
    iteration: int
    attempt: int
    sources: tuple[str, ...]
    untrusted_since: int


class Recovery:
    """Watches one run and brings it back.

    Attributes:
        recoveries: spikes dealt with so far; to be stored in each checkpoint's Megatron arguments
            as `recovery_log.RECORD`, which tells healthy checkpoints from spoiled ones.
    """

    def __init__(
        self,
        models: Sequence[Any],
        optimizer: Any,
        *,
        roots: Sequence[str | Path],
        rollback: Rollback,
        settings: RecoverySettings | None = None,
        metadata: Mapping[str, Any] | None = None,
        every: int = 1,
        comm: Comm | None = None,
        told: Told = lambda event: None,
    ) -> None:
        """Read the log. Collective.

        Args:
            models: the chunks, as Megatron's training passes them around.
            optimizer: Megatron's.
            roots: folders with the run's checkpoints; the log is kept in the first, and of the
                others nothing is used that is newer than what `resumed` is told of.
            rollback: every rank calls it with the newest healthy checkpoint.
            settings: how.
            metadata: what `sharded_state_dict` gets; None for its default.
            every: iterations whose losses are exchanged at once, so that the job waits for the GPU
                no more often than its own log does.
            comm: the ranks, by default all.
            told: every rank calls it with each event, for the curves that a run is followed by.
        """
        refuse_remote("roots", *roots)
        self.settings = settings or RecoverySettings()
        self._models, self._optimizer, self._metadata = models, optimizer, metadata
        self._roots = tuple(dict.fromkeys(Path(root) for root in roots))
        self._rollback, self._every, self._told = rollback, every, told
        self._comm = Comm() if comm is None else comm
        self._detector = SpikeDetector(self.settings.spike)
        self._pending: list[tuple[int, Any, Any]] = []
        self._begun_at: int | None = None
        history = self._history(self._roots[0])
        self.recoveries = len(history.spikes)
        self._unjudged_since = history.unjudged_since

    def step(self, iteration: int, loss: Any = None, grad_norm: Any = None) -> Recovered | None:
        """Look at the loss of an iteration that has just ended; recover if it is lost.

        Args:
            iteration: that has just ended.
            loss: its mean loss (number or 0-D tensor, nats), None on ranks that do not know it.
            grad_norm: before clipping, or None.

        Returns:
            what was done, if anything was.

        Raises:
            RecoverySpentError: attempts are spent, or nothing healthy is left; on every rank.
            PmaError: the recovery failed. If model and optimizer are a mixture, the next forward
                pass or step raises `PoisonedError`.
        """
        self._pending.append((iteration, loss, grad_norm))
        if len(self._pending) < self._every:
            return None
        points, self._pending = agreed(self._pending), []
        for place, value, norm in points:
            verdict = self._detector.update(place, value, norm)
            if verdict is not None:
                say(f"PMA: {verdict.kind.value}: {verdict.reason}")
            self._note_judgement(place)
            if verdict is not None and verdict.fatal:
                said = verdict.kind.value, verdict.reason
                seen = self._note(verdict.onset, verdict.confirmed, *said)
                return self._recover(seen, iteration)
        return None

    def resumed(
        self,
        iteration: int,
        recoveries: int | None,
        state: Mapping[str, Any] | None = None,
        *,
        root: str | Path | None = None,
        unknown_because: str = "it does not say",
    ) -> Recovered | None:
        """Go on after a resume; recovers at once if the checkpoint was saved in a spike.

        Args:
            iteration: that was resumed.
            recoveries: what the checkpoint says of them; None if that is not known.
            state: `state_dict` as stored with it, or None.
            root: that it lies in, with its log; None for the first.
            unknown_because: why `recoveries` is None.

        Returns, raises:
            as `step`; CheckpointError where a spike is known that the checkpoint may be of.
        """
        root = self._roots[0] if root is None else Path(root)
        if state is not None:
            self._detector.load_state_dict(state)
        self._begun_at = iteration
        history = self._history(root)
        own, since = self._history(self._roots[0]).unjudged_since, history.unjudged_since
        before = since if since is not None and since <= iteration else None
        self._unjudged_since = before if own is None else own
        if state is None and self._unjudged_since is not None:
            self._detector.restart(iteration)
        begun = [spike for spike in history.spikes if iteration >= spike.onset]
        if begun and recoveries is None:
            raise CheckpointError(
                _NOT_KNOWN.format(
                    iteration=iteration, root=root, onset=begun[-1].onset, why=unknown_because
                )
            )
        spoiled = [spike for spike in begun if spike.number > (recoveries or 0)]
        if not spoiled:
            return None
        first = min(spoiled, key=lambda spike: spike.onset)
        say(f"PMA: the checkpoint of iteration {iteration} was saved in a spike: recovering")
        return self._recover(self._own(first, root, iteration), iteration)

    @property
    def suspect_since(self) -> int | None:
        """First iteration of a rise that is neither over nor confirmed, or of what was not judged
        since a recovery; None if all is well."""
        rising = self._detector.suspect_since
        return self._unjudged_since if rising is None else rising

    def state_dict(self) -> dict[str, Any]:
        """The detector's memory, small and plain."""
        return self._detector.state_dict()

    def _history(self, root: Path) -> recovery_log.History:
        return self._comm.on_main("recovery log", lambda: recovery_log.read(root))

    def _own(self, spike: recovery_log.Spike, root: Path, iteration: int) -> recovery_log.Spike:
        """The spike of a root's log as this job's log has it, where its recovery will be noted."""
        if root == self._roots[0]:
            return spike
        same = [s for s in self._history(self._roots[0]).spikes if s.onset == spike.onset]
        said = "resumed", f"{root / recovery_log.FILE} has it as spike {spike.number}"
        return same[-1] if same else self._note(spike.onset, iteration, *said)

    def _note(self, onset: int, iteration: int, kind: str, reason: str) -> recovery_log.Spike:
        """Write a spike into the log: from here on its checkpoints are not trusted."""
        spike = recovery_log.Spike(self.recoveries + 1, onset)
        self._log(
            recovery_log.DETECTED,
            number=spike.number,
            onset=onset,
            iteration=iteration,
            kind=kind,
            reason=reason,
        )
        return spike

    def _note_judgement(self, iteration: int) -> None:
        """Write into the log that the loss after a recovery is well: later saves are trusted."""
        since = self._unjudged_since
        if since is not None and iteration > since and self._detector.judged:
            self._log(recovery_log.JUDGED, number=self.recoveries, iteration=iteration)
            self._unjudged_since = None

    def _recover(self, spike: recovery_log.Spike, iteration: int) -> Recovered:
        try:
            chosen, attempt = self._comm.on_main("choose", lambda: self._choose(spike))
        except PmaError as error:
            self._log(
                recovery_log.SPENT, number=spike.number, iteration=iteration, reason=str(error)
            )
            raise RecoverySpentError(
                f"no recovery from the spike at iteration {spike.onset}: {error}"
            ) from error
        refs = chosen.selection.refs
        sources = tuple(ref.path for ref in refs)
        self._log(
            recovery_log.BEGUN,
            number=spike.number,
            iteration=iteration,
            attempt=attempt,
            newest_healthy=chosen.newest,
            sources=list(sources),
        )
        names = ", ".join(ref.describe() for ref in refs)
        say(f"PMA: recovery, attempt {attempt} of {self.settings.attempts}, from {names}")
        for line in lines(chosen.passed_over, refs[-1]):
            say(f"PMA: {line}")
        whole = trainer_of(self._models, self._optimizer)
        with forward_hooks_off(self._models), poisoned_on_failure(whole, "going back"):
            self._comm.agree("rollback", lambda: self._rollback(refs[-1]))
        cure(whole)
        merge_into(
            self._models,
            self._optimizer,
            load=str(self._roots[0]),
            selection=SelectionRequest(paths=sources),
            method=self.settings.method,
            optimizer_state=self.settings.optimizer_state,
            threads=self.settings.threads,
            metadata=self._metadata,
        )
        self._log(recovery_log.DONE, number=spike.number, iteration=iteration)
        self.recoveries = max(self.recoveries, spike.number)
        self._detector.restart(iteration)
        before = self._unjudged_since
        since = spike.onset if before is None else min(before, spike.onset)
        self._unjudged_since = iteration
        say(f"PMA: recovered after iteration {iteration}; the data moves on")
        return Recovered(
            number=spike.number,
            onset=spike.onset,
            iteration=iteration,
            attempt=attempt,
            sources=sources,
            untrusted_since=since,
        )

    def _choose(self, spike: recovery_log.Spike) -> tuple[Healthy, int]:
        """On the main rank: the checkpoints to go back to, and which attempt from there it is."""
        refs = [r for r in self._listed() if not (r.snapshot and self._needs_moments)]
        history, margin = recovery_log.read(self._roots[0]), self.settings.margin_iterations
        # What was too close to an earlier onset must not count as healthy for a later one.
        onsets = [s.onset for s in history.spikes]
        for root, last in self._others:
            onsets += [s.onset for s in recovery_log.read(root).spikes if s.onset <= last]
        before = tuple(Span(onset - margin, onset - 1) for onset in onsets)

        def choose(further_back: int) -> Healthy:
            request = HealthyRequest(
                onset=spike.onset, margin_iterations=margin, further_back=further_back, spans=before
            )
            return choose_healthy(refs, request, most=self.settings.last)

        attempts = history.attempts_from(choose(0).newest)
        if attempts >= self.settings.attempts:
            raise SelectionError(
                f"{attempts} attempts from the same healthy checkpoints did not hold. Lower the "
                "learning rate, look at the data, and resume with `pma recover`"
            )
        return choose(attempts), attempts + 1

    @property
    def _others(self) -> Iterator[tuple[Path, int]]:
        """Roots that this run has begun from, and the last iteration that it shares with them."""
        if self._begun_at is not None:
            yield from ((root, self._begun_at) for root in self._roots[1:])

    def _listed(self) -> list[CheckpointRef]:
        found: dict[int | None, CheckpointRef] = {}
        for ref in list_checkpoints(self._roots[0]):
            found.setdefault(ref.iteration, ref)
        for root, last in self._others:
            for ref in list_checkpoints(root):
                if ref.iteration is not None and ref.iteration <= last:
                    found.setdefault(ref.iteration, ref)
        return list(found.values())

    @property
    def _needs_moments(self) -> bool:
        return self.settings.optimizer_state == "average"

    def _log(self, event: str, **fields: Any) -> None:
        self._comm.on_main(
            f"recovery log ({event})", lambda: recovery_log.append(self._roots[0], event, **fields)
        )
        self._told({"event": event, **fields})


_NONE, _FINITE, _INF, _NAN = 0.0, 1.0, 2.0, 3.0


def agreed(points: Sequence[tuple[int, Any, Any]]) -> list[tuple[int, float, float | None]]:
    """Points (iteration, loss, gradient norm) as the ranks that know them see them. Collective.

    Points whose loss no rank knows are left out. NaN on one rank is NaN on all.
    """
    rows = [[part for value in row[1:] for part in _coded(value)] for row in points]
    table = torch.tensor(rows, dtype=torch.float64)
    if dist.is_initialized():
        if "nccl" in str(dist.get_backend_config()):
            table = table.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
    result = []
    for (iteration, _, _), (kind, loss, norm_kind, norm) in zip(
        points, table.tolist(), strict=True
    ):
        if kind != _NONE:
            known = _decoded(norm_kind, norm) if norm_kind != _NONE else None
            result.append((iteration, _decoded(kind, loss), known))
    return result


def _coded(value: Any) -> tuple[float, float]:
    """(kind, value), so that the largest over ranks is what any knows; the MAX of NaN is not."""
    if value is None:
        return _NONE, -math.inf
    number = float(value)
    if math.isfinite(number):
        return _FINITE, number
    return (_NAN if math.isnan(number) else _INF), -math.inf


def _decoded(kind: float, value: float) -> float:
    return {_FINITE: value, _INF: math.inf, _NAN: math.nan}[kind]
