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
        float32: True where the other library keeps float32 whatever the model's dtype is (the bias
            that only chooses experts); it must not be rounded to `--dtype`.
    """

    name: str
    shape: tuple[int, ...]
    filled_by: tuple[FilledBy, ...]
    float32: bool = False


@dataclass(frozen=True, slots=True)
class ExportMap:
    """All tensors of the exported model, and what of the checkpoint is in none of them.

    Attributes:
        tensors: in the order of the model: embedding, layers, final norm, output layer.
        notes: a sentence for the user about everything of the checkpoint that was left out.
        compared: names and shapes are those that the model's configuration says, or the names those
            of its own weights; False where they are the checkpoint's, whatever those are.
    """

    tensors: tuple[ExportTensor, ...]
    notes: tuple[str, ...] = ()
    compared: bool = True
