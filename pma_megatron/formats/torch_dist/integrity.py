"""`integrity.json`: the SHA-256 of a checkpoint's files, as Megatron writes and checks it.

`--verify-integrity` (main of 2026-08) writes it after every save, and refuses to load without it
(megatron/core/dist_checkpointing/validation.py, `save_integrity_manifest`,
`verify_integrity_manifest`): plain files directly in the folder, the file itself left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pma_megatron.formats.output import Digests


def _covers(name: str) -> bool:
    return "/" not in name


def _content(sha256_of: Mapping[str, str]) -> bytes:
    files = {name: sha256_of[name] for name in sorted(sha256_of)}
    return json.dumps({"algorithm": "sha256", "files": files}, indent=2).encode()


INTEGRITY = Digests("integrity.json", _covers, _content)
"""What an output gets if its newest source has it."""
