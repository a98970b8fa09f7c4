"""What an exported model consists of: its tensors, and which boxes of a checkpoint fill them.

Pure arithmetic, no torch and no files: a map of a model family makes these values from a
configuration and the checkpoint's names and shapes, and the exporter places bytes after them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pma_megatron.base.boxes import Box


@dataclass(frozen=True, slots=True)
class FilledBy:
    """A box of the checkpoint's tensor `key` that is, row-major, part of an exported tensor.

    Attributes:
        key: the model tensor's name in the checkpoint.
        box: in that tensor's global index space; stacked layers and experts are leading axes.
        start: element of the exported tensor at which the box begins; its elements follow there
            without a gap.
    """

    key: str
    box: Box
    start: int


@dataclass(frozen=True, slots=True)
class ExportTensor:
    """One tensor of the exported model.

    Attributes:
        name: as the other library calls it, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: of the whole tensor.
        filled_by: boxes that cover it, each element once, in the order of their `start`.
    """

    name: str
    shape: tuple[int, ...]
    filled_by: tuple[FilledBy, ...]
