"""Every format against the contract (`pma_megatron.testing.conformance`), on real checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hf_models import tensors, train_and_save, train_with_trainer
from test_snapshots import DTYPES, SAVES
from test_snapshots import train as train_with_snapshots

from conftest import DENSE, folder_of
from deepspeed_runs import Harm, load, tag, train
from oracle import global_tensors, read_by_torch
from pma_megatron.formats.base import MAIN_PARAM
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.runs.describe import describe
from pma_megatron.testing import run_ranks
from pma_megatron.testing.conformance import FormatConformance
from pma_megatron.testing.plain_reads import WEIGHT, Key
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from runs import to_universal

GOLDEN = Path(__file__).parents[1] / "golden"


class TorchDist(FormatConformance):
    """One optimizer layout, as a release of Megatron wrote it (tests/golden)."""

    format = "torch_dist"
    archive: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("run")
        shutil.unpack_archive(GOLDEN / f"{cls.archive}.tar.xz", folder)
        return folder

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """Weights as torch.distributed.checkpoint reads them, the rest as trainers held it."""
        files = sorted(folder.parent.glob("live_rank*.pt"))
        saves = [torch.load(file, weights_only=True) for file in files]
        states = [[saved[int(folder.name.removeprefix("iter_"))]] for saved in saves]
        names = {MAIN_PARAM: "main_params", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        found: dict[Key, torch.Tensor] = {
            (state, key): torch.from_numpy(values[0]).float()
            for state, held in names.items()
            for key, values in global_tensors(states, held).items()
        }
        weights = {key for state, key in found if state == MAIN_PARAM}
        return {**found, **{(WEIGHT, key): t for key, t in read_by_torch(folder, weights).items()}}

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """Shards of another folder, by relative and by absolute names."""
        for name in (f"../../{outside.name}/__0_0.distcp", f"{outside}/__0_0.distcp", "/dev/zero"):
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            for stored in metadata.storage_data.values():
                stored.relative_path = name
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
            yield f"shards in {name}"


class TestFullyReshardable(TorchDist):
    archive = "0.15.3-fully_reshardable-dense"


class TestFullyReshardableOfMain(TorchDist):
    """The common state is an entry of the shards here."""

    archive = "main-fully_reshardable-dense"


class TestDpReshardable(TorchDist):
    archive = "main-dp_reshardable-dense"


class TestDpZeroGatherScatter(TorchDist):
    archive = "0.14.0-dp_zero_gather_scatter-dense"


class TestFullyShardedModelSpace(TorchDist):
    archive = "0.14.0-fully_sharded_model_space-dense"


class TestFullyShardedModelSpaceOfExperts(TorchDist):
    archive = "0.13.1-fully_sharded_model_space-moe_ep2"


KINDS = {"zero1": DeepSpeedConfig(stage=1), "zero3": DeepSpeedConfig(stage=3)}
NATIVE, CONVERTED, HELD = "native", "universal", "held"


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, native and Universal, and what its trainer held at every tag."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    roots = {kind: str(folder / NATIVE / kind) for kind in KINDS}
    held = run_ranks(train, 2, {roots[kind]: KINDS[kind] for kind in KINDS})[0]
    universal = {roots[kind]: str(folder / CONVERTED / kind) for kind in KINDS}
    run_ranks(to_universal, 1, universal, init=False)
    for kind, root in roots.items():
        (folder / HELD / kind).mkdir(parents=True)
        for saved in held[root]:
            torch.save(saved, folder / HELD / kind / tag(Path(), saved["iteration"]).name)
    return folder


class DeepSpeed(FormatConformance):
    """A native tag of ZeRO."""

    format = "deepspeed"
    kind: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, deepspeed_runs: Path) -> Path:
        return deepspeed_runs / NATIVE / cls.kind

    def masters(self, folder: Path) -> dict[str, torch.Tensor]:
        """Main params as the trainer held them when it saved this tag."""
        return dict(load(folder.parents[2] / HELD / self.kind / folder.name)["masters"])

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """Main params that the trainer held, weights as torch.load reads them (ZeRO-1 has them)."""
        masters = self.masters(folder)
        found = {(MAIN_PARAM, name): value for name, value in masters.items()}
        if self.kind == "zero1":
            module = load(folder / "mp_rank_00_model_states.pt")["module"]
            found |= {(WEIGHT, name): module[name] for name in masters}
        return found

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """A function for unpickling to call. No file of a native tag says names of others."""
        file = min(folder.rglob("*optim*.pt"))
        torch.save({**load(file), "harm": Harm(outside.with_name("made"))}, file)
        yield "a function that unpickling calls"


class TestDeepSpeedZero1(DeepSpeed):
    kind = "zero1"


class TestDeepSpeedZero3(DeepSpeed):
    kind = "zero3"


class Universal(DeepSpeed):
    """The same tags after DeepSpeed's converter.

    DeepSpeed reads no float32 copy of what is not trained: buffers, frozen parameters and the
    second name of a tied one are in the model states.
    """

    format = "deepspeed_universal"
    spare = tuple(f"zero/{name}/fp32.pt" for name in ("calls", "mean", "frozen", "tied.weight"))

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, deepspeed_runs: Path) -> Path:
        return deepspeed_runs / CONVERTED / cls.kind

    @pytest.fixture
    def copy(self, folders: list[Path], tmp_path: Path) -> Path:
        """One that a test may change."""
        return Path(shutil.copytree(folders[-1], tmp_path / folders[-1].name))

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """What torch.load reads of every file of a trained parameter."""
        found = dict(super().oracle(folder))
        for name, master in self.masters(folder).items():
            for state, file in ((MAIN_PARAM, "fp32"), ("exp_avg", "exp_avg")):
                saved = torch.load(folder / "zero" / name / f"{file}.pt", weights_only=False)
                value = saved["param"] if isinstance(saved, dict) else saved
                found[state, name] = value.detach().reshape(master.shape)
            assert torch.equal(found[MAIN_PARAM, name], master), name
        return found

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """Also a parameter, which has a folder of its name, called like a folder elsewhere."""
        yield from super().hostile(folder, outside)
        for name in (f"../../{outside.name}/zero/first.weight", f"{outside}/zero/first.weight"):
            for file in folder.glob("*model_states.pt"):
                state = load(file)
                groups = [
                    {name if key == "first.weight" else key: shape for key, shape in group.items()}
                    for group in state["param_shapes"]
                ]
                torch.save({**state, "param_shapes": groups}, file)
            yield f"a parameter called {name}"


class TestUniversalOfZero1(Universal):
    kind = "zero1"

    def test_weights_alone_of_a_parameter_without_fragments(self, copy: Path) -> None:
        """The converter writes no moments of an empty parameter."""
        for file in ("exp_avg.pt", "exp_avg_sq.pt", "step.pt"):
            (copy / "zero" / "norm.bias" / file).unlink(missing_ok=True)
        assert describe(copy).state == "complete"


class TestUniversalOfZero3(Universal):
    kind = "zero3"

    @pytest.mark.parametrize(("partitions", "whole"), [(1, True), (2, False), (10**15, False)])
    def test_ranks_that_hold_no_partition_save_nothing(
        self, copy: Path, partitions: int, whole: bool
    ) -> None:
        """MiCS: the first group of ranks holds all partitions, and saves them alone."""
        (copy / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
        state = torch.load(copy / "zero" / "optimizer_state.pt", weights_only=False)
        torch.save({**state, "partition_count": partitions}, copy / "zero" / "optimizer_state.pt")
        assert (describe(copy).state == "complete") is whole


@pytest.fixture(scope="module")
def snapshot_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with full checkpoints and snapshots, per dtype of those, and its main params."""
    folder = tmp_path_factory.mktemp("snapshots")
    roots = {dtype: str(folder / dtype) for dtype in DTYPES}
    made = run_ranks(train_with_snapshots, 2, DENSE, roots)
    held = global_tensors([states for states, _ in made], "main_params")
    for number, iteration in enumerate(SAVES):
        values = {key: torch.from_numpy(saves[number]) for key, saves in held.items()}
        torch.save(values, folder / folder_of(Path(), iteration).name)
    return folder


class Snapshots(TorchDist):
    """Thin snapshots alone: `torch_dist` whose weights are main params in one dtype."""

    has_tracker = False
    optimizer_state = "drop"
    dtype: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, snapshot_runs: Path) -> Path:
        return snapshot_runs / cls.dtype / SNAPSHOTS

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """Main params that the trainer held, and what torch.distributed.checkpoint reads."""
        held = torch.load(folder.parents[2] / folder.name)
        for key, value in read_by_torch(folder, held).items():
            assert torch.equal(value, held[key].to(DTYPES[self.dtype])), key
        return {(WEIGHT, key): value.to(DTYPES[self.dtype]) for key, value in held.items()}


class TestSnapshotsInFloat32(Snapshots):
    dtype = "float32"


class TestSnapshotsInBfloat16(Snapshots):
    dtype = "bfloat16"


def without_last_newlines(root: Path) -> Path:
    """A JSON file without its last newline says the same: every other byte is needed."""
    for path in root.rglob("*.json"):
        path.write_bytes(path.read_bytes().rstrip())
    return root


class Models(FormatConformance):
    """Folders of a Hugging Face model, which transformers saved in the course of a training."""

    format = "safetensors"
    has_tracker = False
    counts_samples = False
    optimizer_state = "latest"
    beside: ClassVar[Mapping[str, bool]] = {
        "ours/rank0/sampler.bin": False,
        "ours.json": True,
        "adapter_config.json": False,
        "global_step6.pth": False,
    }
    left = (
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    )
    made = ("README.md",)
    spare = (
        "generation_config.json",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    )

    def oracle(self, folder: Path) -> Mapping[Key, torch.Tensor]:
        """What the safetensors library reads."""
        return {(WEIGHT, name): value for name, value in tensors(folder)}

    def hostile(self, folder: Path, outside: Path) -> Iterator[str]:
        """An index that names files of another folder, and headers that lie."""
        file = min(folder.glob("*.safetensors"))
        names = [name for name, _ in tensors(folder)]
        for place in (f"../../{outside.name}/{file.name}", f"{outside}/{file.name}", "/dev/zero"):
            index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            yield f"tensors in {place}"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        fields, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        first, second = [name for name in fields if name != "__metadata__"][:2]
        begin, end = fields[first]["data_offsets"]
        for what, changed in {
            "negative offsets": {"data_offsets": [begin - (1 << 40), end - (1 << 40)]},
            "huge offsets": {"data_offsets": [begin + (1 << 70), end + (1 << 70)]},
            "offsets of another tensor": {"data_offsets": fields[second]["data_offsets"]},
            "a shape of nothing": {"shape": [-1, -1]},
            "a shape beyond all memory": {"shape": [1 << 62, 1 << 62]},
            "true for a number": {"shape": [True]},
            "no dtype": {"dtype": None},
            "a dtype of no one": {"dtype": "F7"},
        }.items():
            text = json.dumps({**fields, first: {**fields[first], **changed}}).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
            yield what
        text = json.dumps(fields).encode()
        twice = text[:-1] + b"," + json.dumps({first: fields[first]}).encode()[1:]
        for what, header in {
            "a name that is there twice": twice,
            "no JSON": b"{" + b"x" * 100,
            "nested lists without end": b'{"a":' + b"[" * 100_000,
            "a list": b"[]",
            "a number of so many digits": b'{"a":' + b"9" * 10_000 + b"}",
        }.items():
            file.write_bytes(len(header).to_bytes(8, "little") + header + rest)
            yield what
        for length in (0, 1 << 40, (1 << 64) - 1):
            file.write_bytes(length.to_bytes(8, "little") + data[8:])
            yield f"a header of {length} bytes"


class TestModelsOfTrainer(Models):
    """In one file, tied embeddings stored once, beside what the Trainer resumes from."""

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return without_last_newlines(
            train_with_trainer(tmp_path_factory.mktemp("trainer") / "run", 3)
        )


class TestModelsInShards(Models):
    """In several files, other ones in each folder, in bfloat16."""

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        names = [f"checkpoint-{2 * number}" for number in (1, 2, 3)]
        root = tmp_path_factory.mktemp("shards")
        return without_last_newlines(train_and_save(root, names, ("5KB", "1GB", "8KB")))
