"""Which averages are the watch's own: only those are replaced, and only those are deleted.

Every merge of a watch writes into `pma.json` the settings by which the watch selects (`watched`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import named
from pma_megatron.errors import CheckpointError, PublishError, SelectionError, VerifyError
from pma_megatron.formats.manifest import read_marker
from pma_megatron.merging.leftovers import Target, unfinished
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.rewritten import rewritten
from pma_megatron.merging.rolling import ROLLING, read
from pma_megatron.merging.saved_over import saved_over, since
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.storage.paths import absolute, path_of

WATCHED = "PMA_WATCHED"
ROLLED = "PMA_ROLLING"
"""Environment variables that hand `watched` and `rolling` to the merge of a launch command."""
_DECIDE = ("watched", "load", "method", "policy", "lr_factor", "dtype", "sweep")


def marked(request: MergeRequest) -> MergeRequest:
    """The request of a watch, by whose `watched` its averages are known."""
    return replace(request, watched=json.dumps(asdict(request.selection), sort_keys=True))


def is_own(folder: Path, request: MergeRequest) -> bool:
    """Whether a watch with the settings of `request` (`marked`) made what lies in `folder`.

    What cannot be read, what another command made, what a watch with other settings made, and what
    training has saved over since is not its own.
    """
    if folder.is_symlink() or saved_over(folder, quick=True):
        return False
    try:
        said = read_marker(folder).value
    except (CheckpointError, VerifyError, OSError):
        return False
    made = said.get("request")
    if request.watched is None or said.get("kind") not in (None, "export"):
        return False
    if not isinstance(made, dict):
        return False
    if ROLLING in said:  # it was asked for by the method that its members are weighted by
        rolled = read(said[ROLLING])
        made = {**made, "method": None if rolled is None else rolled.method}
    return _decisive(made) == _decisive(_plain(request))


def _plain(request: MergeRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(request)))
    return {**found, "load": absolute(request.load)}


def _decisive(request: dict[str, Any]) -> list[Any]:
    return [request.get(name) for name in _DECIDE]


def replaces(wanted: Iterable[Target], request: MergeRequest) -> bool:
    """Whether an average of this watch lies where the merge of `request` is to go.

    Raises:
        PublishError: something else does, which is never replaced.
    """
    there = [each for each in wanted if each.final.exists() or each.final.is_symlink()]
    own = [each for each in there if is_own(each.final, request)]
    for each in there:
        if each in own or unfinished(each):
            continue
        if changed := saved_over(each.final):
            raise PublishError(
                f"{each.final} was an average, and {since(changed, each.folder)}. It stays as it "
                f"is: choose another {named(each.setting)}, a folder of this watch alone"
            )
        raise PublishError(
            f"{each.final} was not made by this watch with these settings, and is not "
            f"replaced: move it elsewhere, or choose another {named(each.setting)}"
        )
    return bool(own)


def old_of_own(
    root: Path, request: MergeRequest, *, end: int, keep: int
) -> tuple[frozenset[str], dict[str, str]]:
    """Folders of the averages of this watch up to `end`, but for the newest `keep` of them.

    Those of iterations past `end` are of a branch that the run has given up: they stay.

    Returns:
        what may go; and what stays because something else was written over it, with why.

    Raises:
        CheckpointError, SelectionError: what lies there cannot be read.
    """
    root = path_of(str(root), again=True)
    refs = [ref for ref in list_checkpoints(root) if is_own(path_of(ref.folder), request)]
    numbered = sorted((ref.iteration, ref.folder) for ref in refs if ref.iteration is not None)
    upto = [(iteration, folder) for iteration, folder in numbered if iteration <= end]
    old = [folder for iteration, folder in upto[:-keep] if iteration != end]
    stay = {folder: why for folder in old if (why := _why_it_stays(path_of(folder)))}
    return frozenset(set(old) - set(stay)), stay


def _why_it_stays(folder: Path) -> str:
    try:
        names = rewritten(folder)
    except (CheckpointError, SelectionError, OSError) as error:
        return f"whether it is as it was made cannot be told: {error}"
    return since(names) if names else ""


def is_as_made(folder: Path) -> bool:
    """Whether nothing was written over an average since, as far as can be told now."""
    return not _why_it_stays(folder)
