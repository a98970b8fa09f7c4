"""Which entries of a DCP checkpoint are the model, which the optimizer, by their names alone.

`torch.distributed.checkpoint.save` flattens the state dict that it is given and keeps the path of
every entry in it (`planner_data`). Trainers name the parts of that dictionary as they like; inside,
names are torch's (torch/distributed/checkpoint/state_dict.py):

* an optimizer is `{"state": {parameter: {state: tensor}}, "param_groups": [...]}`, or, flattened
  by `StateDictOptions(flatten_optimizer_state_dict=True)`, has keys `state.<parameter>.<state>` and
  `param_groups.<parameter>.<setting>`. `Optimizer.state_dict()` itself has numbers for parameters;
* a model is a dictionary of those parameters, and of buffers.

So the optimizer is where `state` and `param_groups` are, and the model is the dictionary in which
the optimizer's parameters are found, wherever either lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pma_megatron.formats.base import MAIN_PARAM

Path = tuple[str | int, ...]
"""Where an entry lies in the state dict that was saved."""

STEP = "step"
FIRST: Mapping[str, float] = {STEP: 0.0, "mu_product": 1.0, "mu": 1.0}
"""What an optimizer counts along with its steps, one number for a parameter, and where it begins:
NAdam's product of momenta, ASGD's weight of the newest iterate (torch/optim)."""
COUNTED = frozenset({*FIRST, "eta"})
"""Those, and the rate that ASGD counts down: of one number for a parameter, none is a moment."""
NOT_RESET = ("step_size", "eta", "z")
"""States that begin neither at zero nor at a number that is the same in all runs: rates of Rprop
and of ASGD, and the weights that schedule-free optimizers keep."""
STATE, GROUPS = "state", ("param_groups", "param_to_group_meta")
"""The latter, by parameter, is what Megatron-FSDP saves (`sharded_param_state_fsdp_dtensor`)."""
_MODELS = ("model", "module", "state_dict", "model_state_dict")
"""What trainers call the model in what they save, where no optimizer tells."""
_MAIN = ("fp32_param", "master_param", "master_params", "master_weight", "param")
"""How optimizers call float32 copies of 16-bit parameters that they keep in their state."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the entries of a checkpoint are.

    Attributes:
        weights: the model's own name of a parameter or buffer -> key under which it is stored.
        states: optimizer state -> name of the parameter -> stored key. A parameter that the
            optimizer knows by its number alone has that for its name.
        optimizer: stored keys of all that belongs to optimizers.
        numbered: whether parameters have numbers there.
        unnamed: stored keys of tensors of an optimizer that are no state of a parameter.
    """

    weights: Mapping[str, str]
    states: Mapping[str, Mapping[str, str]]
    optimizer: frozenset[str]
    numbered: bool
    unnamed: tuple[str, ...]


def names_of(paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """Tell the model from the optimizer.

    Args:
        paths: of every entry, by stored key.
        shapes: of every tensor, by stored key.

    >>> paths = {
    ...     "model.out.bias": ("model", "out.bias"),
    ...     "optimizer.state.out.bias.exp_avg": ("optimizer", "state", "out.bias", "exp_avg"),
    ...     "optimizer.param_groups.0.lr": ("optimizer", "param_groups", 0, "lr"),
    ... }
    >>> names = names_of(paths, {key: (4,) for key in list(paths)[:2]})
    >>> names.weights, names.states
    ({'out.bias': 'model.out.bias'}, {'exp_avg': {'out.bias': 'optimizer.state.out.bias.exp_avg'}})
    """
    places = {key: place for key, path in paths.items() if (place := _in_optimizer(path))}
    roots = {_root(place[0]) for place in places.values() if place[1] in GROUPS}
    named = {_root(c) for c, _, _ in places.values() if _is_optimizer(c)}
    roots = roots - {()} | named if named else roots  # modules may be called `state`, too
    optimizer = {
        key
        for key, path in paths.items()
        if any(path[: len(root)] == root for root in roots if root)
        or (() in roots and key in places and places[key][0] == ())
    }
    states: dict[str, dict[str, str]] = {}
    unnamed = []
    for key in shapes:
        if key not in optimizer:
            continue
        _, kind, rest = places.get(key, ((), "", ()))
        if kind != STATE or len(rest) < 2:
            unnamed.append(key)
            continue
        states.setdefault(_state_name(rest), {}).setdefault(str(rest[0]), key)
    trained = {name for tensors in states.values() for name in tensors}
    rest_of = {key: paths[key] for key in shapes if key not in optimizer}
    weights = _weights(rest_of, trained)
    numbered = bool(trained) and all(n.isdecimal() and n not in weights for n in trained)
    return Names(weights, states, frozenset(optimizer), numbered, tuple(unnamed))


def _state_name(rest: Path) -> str:
    name = ".".join(map(str, rest[1:]))
    return MAIN_PARAM if name in _MAIN else name


def _in_optimizer(path: Path) -> tuple[Path, str, Path] | None:
    """(where the optimizer is, `state` or `param_groups`, the path from there); None if nowhere."""
    for number, part in enumerate(path):
        if part in (STATE, *GROUPS) and path[number + 1 :]:
            return path[:number], str(part), path[number + 1 :]
        for kind in (STATE, *GROUPS):
            if isinstance(part, str) and part.startswith(f"{kind}.") and not path[number + 1 :]:
                name, _, last = part.removeprefix(f"{kind}.").rpartition(".")
                return (path[:number], kind, (name, last)) if name else None
    return None


def in_group(path: Path) -> bool:
    """Whether an entry is a setting of a param group."""
    found = _in_optimizer(path)
    return found is not None and found[1] in GROUPS


def _is_optimizer(container: Path) -> bool:
    return any("optim" in str(part).lower() for part in container)


def _root(container: Path) -> Path:
    """The outermost dictionary that is called an optimizer: main params may lie beside states."""
    for number, part in enumerate(container):
        if _is_optimizer((part,)):
            return container[: number + 1]
    return container


def _weights(paths: Mapping[str, Path], trained: Iterable[str]) -> dict[str, str]:
    """The model's tensors: those beside the optimizer's parameters, else by customary names."""
    known = set(trained)
    containers = _holding(known, paths.values())
    if not containers:  # parameters have numbers there: the model is known by its customary name
        models = _customary(paths.values())
        entries = (p for p in paths.values() if len(p) > 1 and p[:-1] in models)
        containers = [*models, *_holding({p[-1] for p in entries}, paths.values())]
    weights: dict[str, str] = {}
    taken: set[str] = set()
    for container in sorted(containers, key=lambda c: not _is_model(c)):
        for key, path in paths.items():
            inside = path[: len(container)] == container and path[len(container) :]
            if inside and key not in taken and (container or len(path) == 1):
                name = ".".join(map(str, inside))
                weights[key if name in weights else name] = key  # a second model: an average of it
                taken.add(key)
    return weights


def _holding(names: AbstractSet[str | int], paths: Iterable[Path]) -> list[Path]:
    """Dictionaries that hold entries of these names, the fullest one first."""
    found = Counter(path[:-1] for path in paths if path[-1:] and path[-1] in names)
    return [container for container, _ in found.most_common()]


def _is_model(container: Path) -> bool:
    return any(part in _MODELS for part in container)


def _customary(paths: Iterable[Path]) -> list[Path]:
    """Dictionaries that hold a model by their name; else the outermost one."""
    prefixes = (
        path[: number + 1]
        for path in paths
        for number, part in enumerate(path[:-1])
        if part in _MODELS
    )
    models = list(dict.fromkeys(prefixes))
    outer = [p for p in models if not any(p[: len(o)] == o for o in models if o != p)]
    return outer or [()]
