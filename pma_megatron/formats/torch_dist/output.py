"""The layout of a merged checkpoint: the newest source's files, with new payloads in them.

Items that keep all their bytes are copied as they are; items with new payloads are laid out afresh
(the same records, and the sizes that the new dtypes need). Nothing is written here: the result says
what goes where.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.spelling import named
from pma_megatron.errors import UsageError
from pma_megatron.formats.dcp.building import Shards, lay_out_shards, saved
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.dcp.metadata_writer import dump_metadata
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.rates import scale_groups, scale_schedule
from pma_megatron.formats.relay import reset_steps
from pma_megatron.formats.torch_dist.checkpoint import (
    COMMON_FILE,
    COMMON_KEY,
    CONFIG_FILE,
    TorchDistCheckpoint,
)
from pma_megatron.formats.torch_dist.integrity import INTEGRITY
from pma_megatron.formats.torch_dist.optimizer import is_optimizer_key

_SMALL_STATE = ".optimizer/shard"  # param groups and steps of `dp_reshardable`


def output_layout(base: TorchDistCheckpoint, changes: Changes) -> OutputLayout:
    """Lay out a merged checkpoint after `base`.

    Raises:
        UsageError: rates are to be scaled, and it stores none.
    """
    shards = lay_out_shards(
        base, base.tensors, base.objects, changes, lambda key: _edited(base, key, changes)
    )
    return OutputLayout(
        files=shards.sizes,
        items=shards.items,
        places=shards.places,
        base_shards=shards.of_base,
        small_files=_small_files(base, changes, shards),
        last_file=CONFIG_FILE,
        digests=INTEGRITY if (base.path / INTEGRITY.file).is_file() else None,
    )


def _edited(base: TorchDistCheckpoint, key: str, changes: Changes) -> bytes | None:
    """New bytes of a small object that the optimizer policy changes, or None."""
    if key == COMMON_KEY:
        return _edited_common(base, changes)
    if not changes.edits_optimizer or not (is_optimizer_key(key) and _SMALL_STATE in key):
        return None
    item = base.objects[key]
    value = base.decode(item, f"{base.path}: {key}")
    zero = reset_steps(value) if changes.optimizer == "reset" else set()
    if changes.lr_factor is not None:
        scale_groups(value, changes.lr_factor, f"{base.path}: {key}")
    return saved(base, item, value, zero)


def _edited_common(base: TorchDistCheckpoint, changes: Changes) -> bytes | None:
    if not (changes.edits_optimizer or changes.optimizer == "drop"):
        return None
    common = dict(base.common)  # what is taken out below stays in the base's
    value: Any = [common] if base.common_is_entry else common
    zero: set[str] = set()
    if changes.optimizer == "drop":
        for name in ("optimizer", "opt_param_scheduler"):
            common.pop(name, None)
    elif changes.optimizer == "reset":
        zero = reset_steps(common.get("optimizer"))
    if changes.lr_factor is not None:
        _scale_common(base, common, changes.lr_factor)
    return saved(base, base.common_item, value, zero)


def _scale_common(base: TorchDistCheckpoint, common: Any, factor: float) -> None:
    what = str(base.path / COMMON_FILE)
    groups = scale_groups(common.get("optimizer"), factor, what)
    rates = scale_schedule(common.get("opt_param_scheduler"), factor, what)
    elsewhere = any(is_optimizer_key(key) and _SMALL_STATE in key for key in base.objects)
    if not rates or not (groups or elsewhere):
        missing = "scheduler" if groups or elsewhere else "param groups"
        raise UsageError(
            f"{named('lr_factor')}: {base.path} stores no learning rates of {missing}. Leave it "
            "out, and lower the rate in the run's own command"
        )


def _small_files(
    base: TorchDistCheckpoint, changes: Changes, shards: Shards
) -> OrderedDict[str, bytes]:
    """Files beside the shards, in the order in which a save writes them: markers last."""
    small: OrderedDict[str, bytes] = OrderedDict()
    if not base.common_is_entry:
        edited = _edited_common(base, changes)
        small[COMMON_FILE] = edited or base.read_small(COMMON_FILE)
    small[METADATA_FILE] = dump_metadata(base.metadata, shards.stored, changes.drop, shards.dtypes)
    small[CONFIG_FILE] = read_source_file(base.path / CONFIG_FILE)
    return small
