"""The model card of an export: what it is, what it was made of, how to load and check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TAGS = ("merge", "pma")


@dataclass(frozen=True, slots=True)
class Averaged:
    """What an average is of: `path`, `iteration` and `consumed_tokens` of each source, oldest
    first, and a coefficient each; `method` says how those were made."""

    method: str
    sources: Sequence[Mapping[str, Any]]
    coefficients: Sequence[float]

    @property
    def used(self) -> list[tuple[Mapping[str, Any], float]]:
        """The sources that count."""
        pairs = zip(self.sources, self.coefficients, strict=True)
        return [(source, value) for source, value in pairs if value != 0]


def card(
    *,
    config: Mapping[str, Any] | None,
    averages: Sequence[Averaged],
    dtype: str,
    parameters: int,
    version: str,
) -> bytes:
    """The text of `README.md`, with the front matter that the Hugging Face Hub reads.

    Args:
        config: of the model; None where the export has none.
        averages: what the model is of; then what that is of, where it is a merged checkpoint.
        dtype: of the stored weights.
        parameters: how many there are.
        version: of this package.
    """
    told = [average for average in averages if len(average.used) > 1]
    causal = config is not None and any(
        isinstance(name, str) and name.endswith("ForCausalLM")
        for name in _listed(config.get("architectures"))
    )
    front = ["---", *(["library_name: transformers"] if config is not None else [])]
    front += ["pipeline_tag: text-generation"] if causal else []
    front += ["tags:", *(f"- {tag}" for tag in (_TAGS if told else _TAGS[1:])), "---"]
    what = "Average of checkpoints" if told else "A checkpoint"
    lines = [
        *front,
        "",
        f"# {what} of one pre-training run",
        "",
        f"{parameters:,} parameters, stored in {dtype}, exported by pma_megatron {version}.",
    ]
    for average in averages:
        lines += _table(average)
    lines += [
        "",
        "`pma.json` has the exact coefficients and the checksums of every file and tensor;",
        "`pma verify FOLDER` compares the files with them, and the values with the sources.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "replace")


def _table(average: Averaged) -> list[str]:
    rows = []
    for source, value in average.used:
        tokens = source.get("consumed_tokens")
        count = "unknown" if tokens is None else f"{tokens:,}"
        path = _plain(str(source["path"]))
        at = "unknown" if source["iteration"] is None else source["iteration"]
        rows.append(f"| {at} | {count} | {value:.8g} | `{path}` |")
    one = len(rows) == 1
    said = "The weights of one checkpoint:" if one else f"Weighted average ({average.method}):"
    head = ["| iteration | tokens | coefficient | source |", "|---:|---:|---:|---|"]
    return ["", said, "", *head, *rows]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(path: str) -> str:
    """A path that stays one cell of a table."""
    return "".join("?" if c in "|`" or not c.isprintable() else c for c in path)
