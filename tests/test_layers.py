"""Imports point one way: the order below is the architecture, and CONTRIBUTING.md draws it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pma_megatron"

ORDER = [
    [
        "version",
        "errors",
        "base.log",
        "base.say",
        "base.spelling",
        "base.faults",
        "base.memory",
        "base.boxes",
        "base.durable",
    ],
    [
        "base.openfiles",
        "transfer.buffers",
        "base.locations",
        "merging.tolerance",
        "base.durations",
        "base.stopping",
        "base.processes",
    ],
    ["base.presence"],
    ["runs.recovery_log"],
    [
        "runs.tokens",
        "merging.coefficients",
        "merging.policy",
        "geometry.spread",
        "spikes.settings",
        "spikes.readers",
        "live.param",
    ],
    ["live.poison"],
    ["spikes.detector", "spikes.metrics", "runs.refs"],
    ["runs.spacing", "runs.gaps"],
    ["runs.selection", "base.comm"],
    ["merging.request", "spikes.healthy"],
    ["scores.grid"],
    ["formats.inert"],
    ["formats.bounds", "formats.pickle_writer", "formats.names", "formats.schema"],
    ["formats.opcode_reader", "formats.json_files"],
    ["formats.opcodes"],
    ["formats.pickles", "formats.zips", "formats.base", "formats.marker"],
    ["formats.manifest"],
    ["formats.items", "formats.output", "formats.source"],
    ["formats.flat", "formats.rates", "formats.relay"],
    ["formats.fingerprints", "spikes.relaunch"],
    ["formats.deepspeed", "formats.torch_dist.cover", "formats.torch_dist.chunks"],
    ["formats.deepspeed.schema"],
    ["formats.torch_dist.metadata"],
    ["scores.scores"],
    ["scores.cautions"],
    ["scores.forecast"],
    ["formats.torch_dist.checkpoint", "formats.deepspeed.checkpoint"],
    ["formats.deepspeed.partitions", "formats.deepspeed.layers", "formats.deepspeed.steps"],
    ["formats.deepspeed.completeness", "formats.deepspeed.saves", "formats.deepspeed.unsharded"],
    ["formats.deepspeed.frozen"],
    ["formats.deepspeed.universal"],
    ["formats.torch_dist", "formats.torch_dist.optimizer", "formats.torch_dist.registration"],
    ["formats.torch_dist.ties", "formats.torch_dist.recomputed"],
    ["formats.torch_dist.assignment"],
    ["formats.torch_dist.peers"],
    ["formats.torch_dist.buckets", "formats.torch_dist.output", "formats.torch_dist.schedule"],
    ["formats.torch_dist.source", "formats.deepspeed.source", "formats.deepspeed.output"],
    ["formats.deepspeed.universal_source", "formats.deepspeed.universal_output"],
    ["formats.registry", "transfer.reads"],
    ["runs.folders"],
    ["runs.trackers", "merging.tasks", "transfer.blocks", "merging.intact"],
    ["runs.discover", "identity", "identity.samples", "identity.stands"],
    ["identity.copies", "identity.lineage", "identity.rounded"],
    ["merging.agreement"],
    ["identity.proof", "merging.rules", "runs.notices"],
    ["merging.planning", "merging.accumulate"],
    ["merging.locks"],
    ["merging.engine", "merging.publish", "merging.verification", "live.plan", "merging.integrity"],
    ["live.load", "merging.finishing", "merging.recompute"],
    ["merging.report"],
    ["merging.job", "merging.published", "merging.inspection"],
    ["spikes.recovery", "geometry.gram"],
    ["online", "online.budget", "online.shard", "online.snapshot_job", "online.swap"],
    ["online.hostcopy", "online.snapshots"],
    ["online.window"],
    ["online.store", "online.origin"],
    ["online.average"],
    ["megatron", "megatron.options", "megatron.params"],
    ["megatron.replicas"],
    ["deepspeed.checks", "deepspeed.options", "deepspeed.record"],
    ["deepspeed.params"],
    ["deepspeed.load", "deepspeed.shard", "deepspeed.swap"],
    ["deepspeed.online"],
    ["deepspeed"],
    ["megatron.checks", "megatron.shard"],
    ["megatron.flags", "megatron.load"],
    ["megatron.init", "megatron.thin", "megatron.recover"],
    ["megatron.rollback"],
    ["megatron.watch"],
    ["megatron.swap", "megatron.trees"],
    ["megatron.evaluate"],
    ["megatron.online", "megatron.score"],
    ["megatron.contour", "megatron.curvature"],
    ["megatron.save", "megatron.scoring"],
    ["megatron.hooks"],
    ["megatron.decorating", "megatron.installing"],
    ["megatron.decorators", "megatron_deepspeed", "megatron_deepspeed.hooks"],
    ["megatron_deepspeed.decorators"],
    ["megatron.install", "megatron_deepspeed.install"],
    ["launch"],
    ["cli.progress", "cli.streams", "cli.tables", "cli.verbs"],
    ["cli.charts", "cli.scoring"],
    ["cli.landscape"],
    ["cli.evaluate", "cli.geometry"],
    ["cli.forecast"],
    ["cli.commands", "cli.recover"],
    ["cli.flags"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "formats" and parts[0] != "testing":
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pma_megatron"):
            module = (node.module or "").removeprefix("pma_megatron").lstrip(".")
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            known = {name for name in inner if name in LEVEL}
            names |= known or {module}
    return names


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if LEVEL[other] >= LEVEL[name]
    ]
    assert not wrong


def test_nothing_imports_the_testing_package_or_the_launch_scripts() -> None:
    for name, path in modules().items():
        text = path.read_text()
        assert "pma_megatron.testing import" not in text, name
        assert "import launch" not in text, name


def test_formats_do_not_know_the_engine() -> None:
    above = {
        "merging.engine",
        "merging.planning",
        "merging.rules",
        "merging.tasks",
        "transfer.blocks",
        "merging.policy",
        "base.comm",
    }
    for name, path in modules().items():
        if name.startswith("formats."):
            assert not imported(path) & above, name
