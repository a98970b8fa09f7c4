"""PMA-init for continued training on another text."""

from lab.transfer import LAST, Transfer

EXPERIMENT = Transfer(domain="code", length=20, factors=(0.25, 0.5, 1.0), floor=0.1).experiment(
    name="continued",
    title="PMA-init for continued training",
    paper="Slightly lower loss at the start, parity later, no tuning of the learning rate needed; "
    "the gradient norm is visibly smoother, with fewer spikes.",
    setup=f"From the end of a constant-rate run on prose, on to code under cosine schedules of "
    f"three peaks: from the SMA of {LAST} checkpoints and from the newest. Dense "
    "and MoE, middle size.",
)
