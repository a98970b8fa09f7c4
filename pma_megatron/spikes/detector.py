"""Loss spikes in the series that a training run logs: which recover, which do not.

Everything counts points of the series, not iteration numbers, so that a run that logs every k-th
iteration works too. Losses are in nats. The same points give the same verdicts on every rank.

A robust z-score over a window of 128 points, as in the skip-step optimizer and the stability
monitor of OLMo-core (`olmo_core/optim/skip_step_optimizer.py`), tells that something is off. What
is new here is what happens then: the run gets time to recover by itself before it is called lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from pma_megatron.errors import UsageError
from pma_megatron.spikes.settings import Kind, SpikeSettings, State, Suspicion, Verdict

__all__ = ["Kind", "SpikeDetector", "SpikeSettings", "Verdict", "detect"]

# A normal distribution has its standard deviation at 1.4826 median absolute deviations, and the
# median of n of its values deviates by sqrt(pi / 2 / n) standard deviations.
SIGMA_PER_MAD = 1.4826
_MEDIAN_SPREAD = math.sqrt(math.pi / 2)

# What may be left of a rise after another `patience`, if the run is to be on its way back.
_RECOVERING = 2 / 3


class SpikeDetector:
    """Watches one series; feed it every logged point in order.

    Costs O(window) per point. All it remembers is in `state_dict`, at most three windows.
    """

    def __init__(self, settings: SpikeSettings | None = None) -> None:
        self.settings = settings or SpikeSettings()
        self._state = State()

    @property
    def suspicion(self) -> Suspicion | None:
        """A rise that has neither recovered nor been confirmed; None if all is well."""
        return self._state.suspicion

    @property
    def suspect_since(self) -> int | None:
        """Its onset; None if all is well."""
        return None if self.suspicion is None else self.suspicion.onset

    @property
    def learning(self) -> bool:
        """Whether the last point was one of those that are learned from and not judged."""
        return self._state.lost or not self._can_judge

    @property
    def judged(self) -> bool:
        """Whether a loss was judged, and found to be well, since the last `restart`, if any."""
        return self._state.judged

    def update(self, iteration: int, loss: float, grad_norm: float | None = None) -> Verdict | None:
        """Take in one point; returns a verdict at the point where something becomes known.

        `loss` in nats, `grad_norm` before clipping; both may be NaN or Inf. After a fatal verdict
        without a `restart` the series is learned anew. Raises UsageError when `iteration` is not
        above the one before.
        """
        state = self._state
        if state.last_iteration is not None and iteration <= state.last_iteration:
            raise UsageError(
                f"iteration {iteration} comes after {state.last_iteration}: points must be in "
                "order; call restart() when the run went back"
            )
        state.last_iteration = iteration
        verdict = self._judge_nonfinite(iteration, loss, grad_norm)
        if verdict is None and math.isfinite(loss):
            verdict = self._judge(iteration, loss, grad_norm)
        if verdict is not None and verdict.fatal:
            self._state.lost = True
        return verdict

    def restart(self, iteration: int) -> None:
        """The run goes on after `iteration`, from an earlier or a repaired state.

        The healthy baseline stays, an open suspicion is dropped, and `cooldown` points pass.
        """
        state = self._state
        self._state = State(
            last_iteration=iteration,
            cooldown=self.settings.cooldown,
            judged=False,
            seen=state.seen,
            healthy=state.healthy,
            norms=state.norms,
            floor=state.floor,
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened; JSON can hold it."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, also one that went through JSON.

        Raises UsageError when it has other keys than this version writes.
        """
        self._state = State.from_dict(state)

    def _judge_nonfinite(
        self, iteration: int, loss: float, grad_norm: float | None
    ) -> Verdict | None:
        state, settings = self._state, self.settings
        finite = math.isfinite(loss)
        bad_norm = grad_norm is not None and not math.isfinite(grad_norm)
        if state.losses.count(iteration, not finite) == settings.nonfinite_losses:
            streak, what = state.losses, f"loss was {loss}"
        elif (
            state.grad_norms.count(iteration, finite and bad_norm) == settings.nonfinite_grad_norms
        ):
            streak, what = state.grad_norms, f"gradient norm was {grad_norm}"
        else:
            return None
        watched = state.suspicion
        return Verdict(
            kind=Kind.NONFINITE,
            onset=streak.onset if watched is None else watched.onset,
            confirmed=iteration,
            baseline=self._baseline() if watched is None else watched.baseline,
            peak=math.nan if watched is None else watched.peak,
            reason=f"the {what} at iteration {iteration}, {streak.points} logged point(s) in a row",
        )

    def _judge(self, iteration: int, loss: float, grad_norm: float | None) -> Verdict | None:
        state = self._state
        if state.lost:
            state = self._state = State(
                last_iteration=iteration, losses=state.losses, grad_norms=state.grad_norms
            )
        if state.cooldown > 0:
            state.cooldown -= 1
            return None
        state.seen += 1
        if state.suspicion is None:
            self._watch_norm(iteration, grad_norm)
            state.suspicion = self._suspect(iteration, loss)
            if state.suspicion is None:
                return self._learn(iteration, loss)
        return self._pursue(state.suspicion, iteration, loss)

    def _watch_norm(self, iteration: int, grad_norm: float | None) -> None:
        """Remember since when the gradient norm is off; a spike often shows there first."""
        state, settings = self._state, self.settings
        if grad_norm is None or not math.isfinite(grad_norm):
            return
        known = len(state.norms) >= settings.settle
        if not known or grad_norm <= settings.grad_norm_ratio * float(np.median(state.norms)):
            state.norm_off = None
        elif state.norm_off is None:
            state.norm_off = iteration
        _push(state.norms, grad_norm, settings.window)

    def _baseline(self) -> float:
        """Median of the newest third of the healthy points, so that a falling loss is followed."""
        losses = [loss for _, loss in self._state.healthy]
        return float(np.median(losses[-max(1, len(losses) // 3) :])) if losses else math.nan

    def _sigma(self) -> float:
        """Noise of the healthy points about the line through the medians of their outer thirds."""
        losses = np.array([loss for _, loss in self._state.healthy])
        third = len(losses) // 3
        slope = (np.median(losses[-third:]) - np.median(losses[:third])) / (len(losses) - third)
        residuals = losses - slope * np.arange(len(losses))
        return SIGMA_PER_MAD * float(np.median(np.abs(residuals - np.median(residuals))))

    @property
    def _can_judge(self) -> bool:
        state, settings = self._state, self.settings
        return state.seen > settings.warmup and len(state.healthy) >= settings.settle

    def _suspect(self, iteration: int, loss: float) -> Suspicion | None:
        """Whether this point alone, or the median of the last few, is far above the baseline."""
        state, settings = self._state, self.settings
        if not self._can_judge:
            return None
        baseline, sigma = self._baseline(), self._sigma()
        spread = _MEDIAN_SPREAD / math.sqrt(settings.settle)
        limit = max(settings.threshold * sigma * spread, settings.min_rise)
        recent = [*state.recent, (iteration, loss)][-settings.settle :]
        alone = loss - baseline > max(settings.threshold * sigma, settings.min_rise)
        if not alone and _median(recent) - baseline <= limit:
            return None
        onset = None
        for place, value in reversed(recent):  # it may be over when it can be judged at last
            if value > baseline + limit / 2:
                onset = place
            elif onset is not None:
                break
        assert onset is not None  # one alone, or their median, lies above the limit
        if state.norm_off is not None and state.norm_off >= recent[0][0]:
            onset = min(onset, state.norm_off)
        for point in state.recent:
            if point[0] < onset:
                _push(state.healthy, point, settings.window)
        state.recent = []
        peak = max(value for place, value in recent if place >= onset)
        return Suspicion(onset=onset, baseline=baseline, limit=limit, peak=peak)

    def _learn(self, iteration: int, loss: float) -> Verdict | None:
        """Let the longest waiting point into the baseline; look for a level that crept up."""
        state, settings = self._state, self.settings
        state.judged = state.judged or self._can_judge
        if len(state.recent) == settings.settle:
            _push(state.healthy, state.recent[0], settings.window)
        _push(state.recent, (iteration, loss), settings.settle)
        if state.seen <= settings.warmup or len(state.healthy) < settings.window:
            return None
        level = _median(state.healthy)
        state.floor = level if state.floor is None else min(state.floor, level)
        rise = level - state.floor
        if rise <= settings.min_rise:
            state.rising_since = None
            return None
        if state.rising_since is None:
            state.rising_since = state.healthy[settings.window // 2][0]
        spread = _MEDIAN_SPREAD / math.sqrt(settings.window)
        if rise <= max(settings.fatal_rise, settings.threshold * self._sigma() * spread):
            return None
        return Verdict(
            kind=Kind.DIVERGENCE,
            onset=state.rising_since,
            confirmed=iteration,
            baseline=state.floor,
            peak=max(value for _, value in [*state.healthy, *state.recent]),
            reason=f"the median loss of {settings.window} logged points crept up from "
            f"{state.floor:.4f} to {level:.4f}",
        )

    def _pursue(self, watched: Suspicion, iteration: int, loss: float) -> Verdict | None:
        """Decide whether the rise is over, lost, a new level, or still open."""
        state, settings = self._state, self.settings
        watched.points += 1
        watched.peak = max(watched.peak, loss)
        _push(state.recent, (iteration, loss), settings.settle)
        if watched.points < settings.settle:
            return None
        rise = _median(state.recent) - watched.baseline
        after = f"after {watched.points} logged points"
        if rise <= watched.limit:
            self._close(watched)
            what = f"rose to {watched.peak:.4f} and was back {after}"
            return _verdict(Kind.RECOVERED, watched, iteration, what)
        if watched.early is None:
            watched.early = watched.rise = rise
        if watched.points % settings.patience:
            return None
        before, watched.rise = watched.rise, rise
        if rise <= before * _RECOVERING:
            return None
        if rise > settings.fatal_rise:
            jumped = watched.early > rise / 2
            kind = Kind.UNRECOVERED if jumped else Kind.DIVERGENCE
            what = f"{'jumped' if jumped else 'crept up'} to {watched.peak:.4f} and is {rise:.4f}"
            return _verdict(kind, watched, iteration, f"{what} too high {after}")
        if rise > before + watched.limit / 2:
            return None
        self._raise_level(rise)
        self._close(watched)
        what = f"stepped up by {rise:.4f}, which is not fatal, and stays there {after}"
        return _verdict(Kind.SHIFT, watched, iteration, what)

    def _close(self, watched: Suspicion) -> None:
        """Back to normal: what waits to enter the baseline is what is not off."""
        state = self._state
        state.judged = True
        top = self._baseline() + watched.limit
        state.recent = [point for point in state.recent if point[1] <= top]
        state.suspicion = state.norm_off = None

    def _raise_level(self, rise: float) -> None:
        """Accept a step: the baseline and what creeping is measured from move along."""
        state = self._state
        state.healthy = [(place, value + rise) for place, value in state.healthy]
        state.floor = None if state.floor is None else state.floor + rise


def detect(
    points: Iterable[tuple[int, float, float | None]], settings: SpikeSettings | None = None
) -> list[Verdict]:
    """All verdicts over a finished series of (iteration, loss, gradient norm or None)."""
    detector = SpikeDetector(settings)
    verdicts = (detector.update(*point) for point in points)
    return [verdict for verdict in verdicts if verdict is not None]


def _verdict(kind: Kind, watched: Suspicion, iteration: int, what: str) -> Verdict:
    return Verdict(
        kind=kind,
        onset=watched.onset,
        confirmed=iteration,
        baseline=watched.baseline,
        peak=watched.peak,
        reason=f"the loss was {watched.baseline:.4f} before iteration {watched.onset}, {what}",
    )


def _median(points: list[tuple[int, float]]) -> float:
    return float(np.median([loss for _, loss in points]))


def _push(values: list[Any], value: Any, most: int) -> None:
    values.append(value)
    del values[:-most]
