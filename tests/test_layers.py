"""Imports point one way: the order below is the architecture, and CONTRIBUTING.md explains it."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pma_megatron"

FOLDERS = [
    ["version", "errors"],
    ["storage"],
    ["base"],
    ["formats"],
    ["formats.dcp"],
    ["formats.torch_dist", "formats.deepspeed", "formats.safetensors"],
    ["formats.registry"],
    ["formats.trainers"],
    ["runs", "transfer", "export.tensors"],
    ["export.families"],
    ["export"],
    ["identity"],
    ["merging"],
    ["live", "geometry", "comparison", "scores", "spikes"],
    ["online"],
    ["retention"],
    ["watching", "writers", "pages"],
    ["megatron", "deepspeed", "fsdp"],
    ["megatron_deepspeed"],
    ["launch"],
    ["cli"],
    ["__main__"],
]
"""A folder imports only what stands above it here; CONTRIBUTING.md says what each is for."""

INSIDE = {
    "base": """
        boxes durable durations faults log memory once openfiles packing processes sizes spelling
        stopping
        presence remote_paths settings steps
        comm
    """,
    "storage": """
        protocol
        folders object_store posix requests
        multi_storage
        addresses contents
        claims spool
        paths
        together
    """,
    "formats": """
        base inert json_files memo zips
        alike bounds holding names outlines pickle_writer pieces rates schema source
        marker opcode_reader output side_files
        manifest opcodes
        pickles
        items
        flat_pieces placed relay
        flat
        contract fingerprints shares
    """,
    "formats.dcp": """
        cover keys written
        stored
        metadata
        metadata_writer
        building checkpoint
        completeness main_params output
        source
        format
    """,
    "formats.torch_dist": """
        chunks integrity registration
        checkpoint
        completeness optimizer recomputed schedule ties
        assignment output
        peers
        buckets
        source
        format
    """,
    "formats.deepspeed": """
        schema
        checkpoint
        layers partitions steps universal
        completeness frozen output saves unsharded
        source
        universal_source
        format
    """,
    "formats.safetensors": """
        config headers progress
        model_files
        model
        output source
        format
    """,
    "formats.trainers": """
        trainer
        hugging_face nvidia
        saves
    """,
    "runs": """
        recovery_log tokens trackers
        folders
        refs told_files
        branches describe gaps marks selection_request spacing
        selection torn
        discover trainer_retention
        notices
    """,
    "transfer": """
        buffers checksums reads
        blocks
        readback units
    """,
    "identity": """
        consumed_samples optimizer_steps samples
        copies lineage rounded
        proof
    """,
    "merging": """
        coefficients locks policy rolling saved_over tasks threads tolerance
        folder_checksums listing
        bulk cards padding rewritten
        agreement cut request sums
        accumulate
        streaming
        ahead
        engine entry_rules finding
        exporting opening task_making
        saved_folder
        planning
        leftovers rate source_checksums verification
        publish targets
        uploading
        structure
        carrying exported finishing journal recompute report
        provenance resuming
        inspection job published
        export_job
    """,
    "live": """
        param poison
        plan
        cost
        load
    """,
    "export": """
        card files own_names
        matching template
    """,
    "export.families": """
        config
        blocks
        trained
        placing deepseek_v3 llama mixtral qwen2 qwen3
    """,
    "geometry": """
        defaults spread
        gram
    """,
    "comparison": """
        differences
        compare
    """,
    "scores": """
        grid
        results
        cautions identity
        forecast
    """,
    "spikes": """
        columns healthy settings textfiles
        consoles points request
        readers
        detector metrics relaunch
        onsets
        unsure
        recovery
    """,
    "online": """
        branch memory_budget one_job remote_folder removal shard shared_folder swap
        average_folder snapshot_job uploads
        average_upload hostcopy snapshot_pruning
        snapshot_branches
        snapshot_upload
        snapshots
        window
        origin store
        average
    """,
    "retention": """
        clock freed request signs surroundings
        keeping resumption unfinished
        decision
        pruning
    """,
    "watching": """
        charge events own request
        commands state
        rolling
        follow
    """,
    "pages": """
        charts section
        pictures
        merged recovered scored
        page
    """,
    "writers": """
        places records
        event_file
        destinations
    """,
    "megatron": """
        flags params resumed tree_functions trees
        checks replicas retained thin writers
        evaluate
        argument_parser load rollback session shard swap
        init online recover score tree_decorators
        contour curvature decorators evaluate_geometry evaluate_grid save watch
        hooks install
    """,
    "deepspeed": """
        checks options reading record
        params
        load shard swap
        online
    """,
    "fsdp": """
        params reading
        load
    """,
    "megatron_deepspeed": """
        decorators hooks
        install
    """,
    "cli": """
        consoles landscape progress request_files streams verbs
        asked listing tables
        curves score_flags score_grid
        commands recover rescored
        compare evaluate flags forecast geometry prune report watch
        command completion
    """,
}
"""Modules of each folder: one imports only those of the lines above its own."""


def places() -> dict[str, tuple[int, int]]:
    """Module -> (level of its folder, line within it); a folder itself comes after all in it."""
    found = {}
    for level, folders in enumerate(FOLDERS):
        for folder in folders:
            lines = INSIDE.get(folder, "").split("\n")
            found[folder] = (level, len(lines))
            found |= {
                f"{folder}.{n}": (level, i) for i, row in enumerate(lines) for n in row.split()
            }
    return found


PLACES = places()


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and parts[0] != "testing":
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pma_megatron"):
            module = (node.module or "").removeprefix("pma_megatron").lstrip(".")
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            known = {name for name in inner if name in PLACES}
            names |= known or {module}
    return names


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(PLACES)


def test_few_files_lie_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_imports_point_up_this_list() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if PLACES[other] >= PLACES[name]
    ]
    assert not wrong


def test_folders_of_one_level_do_not_know_each_other() -> None:
    for name, path in modules().items():
        for other in imported(path):
            same_level = PLACES[other][0] == PLACES[name][0]
            assert not same_level or folder_of(other) == folder_of(name), f"{name} imports {other}"


def folder_of(name: str) -> str:
    return name if name in itertools.chain(*FOLDERS) else name.rpartition(".")[0]


def test_nothing_imports_the_testing_package_or_the_launch_scripts() -> None:
    for name, path in modules().items():
        text = path.read_text()
        assert "pma_megatron.testing import" not in text, name
        assert "import launch" not in text, name
