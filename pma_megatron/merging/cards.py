"""The model card of one output, from what its `pma.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma_megatron.export.card import Averaged, card
from pma_megatron.export.template import CARD_FILE
from pma_megatron.formats.output import OutputLayout
from pma_megatron.merging.rolling import ROLLING, read, rolled_in_words
from pma_megatron.version import __version__


def cards(layout: OutputLayout, made: Mapping[str, Any]) -> dict[str, bytes]:
    """The model card of one output by its name; none where no model is what is written.

    Args:
        layout: of the folder.
        made: what its `pma.json` says.
    """
    if layout.described is None:
        return {}
    origins = [made] if "origin" not in made else [made, made["origin"]]
    text = card(
        config=layout.described.config,
        averages=[
            Averaged(_method(each), each["plan"]["sources"], each["output"]["coefficients"])
            for each in origins
        ],
        dtype=layout.described.dtype,
        parameters=layout.described.parameters,
        version=__version__,
    )
    return {CARD_FILE: text}


def _method(made: Mapping[str, Any]) -> str:
    rolled, method = read(made.get(ROLLING)), str(made["output"]["method"])
    return method if rolled is None else f"{rolled_in_words(made)}; {rolled.sentence()}"
