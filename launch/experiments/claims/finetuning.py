"""PMA-init for fine-tuning: little data, small rates."""

from lab.transfer import LAST, Transfer

EXPERIMENT = Transfer(
    domain="legal", length=6, factors=(1 / 16, 1 / 8, 1 / 4), floor=0.1
).experiment(
    name="finetuning",
    title="PMA-init for fine-tuning",
    paper="Gains at one size, not reproduced at others, never harmful.",
    setup=f"A short run on a small text (licences) at small rates: from the SMA of {LAST} "
    "checkpoints and from the newest. Dense and MoE, middle size.",
)
