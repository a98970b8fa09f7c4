"""The model card of an export: what it is, what it was made of, how to load and check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TAGS = ("merge", "pma")


def card(
    *,
    config: Mapping[str, Any] | None,
    method: str,
    sources: Sequence[Mapping[str, Any]],
    coefficients: Sequence[float],
    dtype: str,
    parameters: int,
    version: str,
) -> bytes:
    """The text of `README.md`, with the front matter that the Hugging Face Hub reads.

    Args:
        config: of the model; None where the export has none.
        method: how coefficients were made, in words.
        sources: `path`, `iteration` and `consumed_tokens` of each, oldest first.
        coefficients: one per source.
        dtype: of the stored weights.
        parameters: how many there are.
        version: of this package.
    """
    used = [(s, c) for s, c in zip(sources, coefficients, strict=True) if c != 0]
    causal = config is not None and any(
        isinstance(name, str) and name.endswith("ForCausalLM")
        for name in _listed(config.get("architectures"))
    )
    front = ["---", *(["library_name: transformers"] if config is not None else [])]
    front += ["pipeline_tag: text-generation"] if causal else []
    front += ["tags:", *(f"- {tag}" for tag in (_TAGS if len(used) > 1 else _TAGS[1:])), "---"]
    what = "Weighted average of checkpoints" if len(used) > 1 else "A checkpoint"
    lines = [
        *front,
        "",
        f"# {what} of one pre-training run",
        "",
        f"{parameters:,} parameters, stored in {dtype}, exported by pma_megatron {version} "
        f"({method}).",
        "",
        "| iteration | tokens | coefficient | source |",
        "|---:|---:|---:|---|",
    ]
    for source, value in used:
        tokens = source.get("consumed_tokens")
        count = "unknown" if tokens is None else f"{tokens:,}"
        path = _plain(str(source["path"]))
        lines.append(f"| {source['iteration']} | {count} | {value:.8g} | `{path}` |")
    lines += [
        "",
        "`pma.json` has the exact coefficients and the checksums of every file and tensor;",
        "`pma verify FOLDER` compares the files with them, and the values with the sources.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "replace")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(path: str) -> str:
    """A path that stays one cell of a table."""
    return "".join("?" if c in "|`" or not c.isprintable() else c for c in path)
