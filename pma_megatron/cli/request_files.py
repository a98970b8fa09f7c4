"""`--from FILE`: what a file asks for, as words of the command line; `--dump-request` writes one.

The words of a file go through the same parser as what is typed, so they are checked, explained and
refused alike. What is typed takes the place of what the file says of the same setting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.settings import Declared, declared, nested
from pma_megatron.base.spelling import first_few, nearest
from pma_megatron.errors import CheckpointError, UsageError, VerifyError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE, PROVENANCE_VERSION, SEAL_FILE
from pma_megatron.merging.request import MergeRequest

FLAG = "--from"
REST = "--"
"""Key of the words that follow `--`."""
_MAX_BYTES = 1 << 20
_LISTED = {"paths", "iterations", "tokens"}
_WINDOW = {"last", "interval_tokens", "interval_iterations", "window_tokens", "end_iteration"}
_WEIGHTING = {"method", "alpha", "floor", "coefficients", "sweep"}
_INSTEAD = (
    ({"paths", "iterations"}, _LISTED | _WINDOW | {"tolerance", "exclude", "allow_gaps"}),
    ({"load"}, {"paths", "tokens"}),
    (_WINDOW, _LISTED),
    ({"interval_tokens"}, {"interval_iterations"}),
    ({"interval_iterations"}, {"interval_tokens", "window_tokens"}),
    ({"window_tokens"}, {"last", "interval_iterations"}),
    ({"last"}, {"window_tokens", "sweep"}),
    ({"method", "coefficients", "sweep"}, _WEIGHTING),
    ({"sweep"}, {"last"}),
)
"""(what is typed, what it takes the place of in a file beside itself)."""
_OF_ONE_RUN = ("save", "export", "overwrite")
_OF_EXPORT = ("like", "max_shard_bytes")
_ALSO = {"watch": "merge"}
"""A command whose settings are those of another, too, and may lie below that one's name."""
_OF_ONE_MERGE = ("overwrite", "timeout", "merge_parallel_size")
"""What a watch decides for itself."""
_NOT_ASKED = ("help", "from_file", "dump_request")


def expanded(words: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """What was typed, with the words of a `--from FILE` after it.

    Args:
        words: what was typed.
        verbs: the parsers of all verbs, by their names.

    Raises:
        UsageError: the file cannot be read, or asks for what the verb does not have.
    """
    end = words.index(REST) if REST in words else len(words)
    verb = verbs.get(words[0]) if words else None
    if verb is None or FLAG not in verb._option_string_actions:
        return list(words)
    own, path = _without_from(words[:end])
    if path is None:
        return list(words)
    typed = set(_typed(own[1:], verb))
    replaced = typed.union(*(instead for those, instead in _INSTEAD if those & typed))
    value = _read(path)
    if "provenance_version" in value:
        if words[0] == "watch" and not typed & {"last", "window_tokens"}:
            raise UsageError(
                f"{FLAG} {path}: it names its sources, and others follow: say how many, with "
                "--last or --window-tokens"
            )
        if words[0] not in ("merge", "plan", "watch"):
            raise UsageError(f"{FLAG} {path}: it is of a merge, and pma {words[0]} does not merge")
        asked = _recorded(path, value, verb, with_export="export" in typed)
        if "paths" in replaced and not typed & {"last", "window_tokens", "iterations", "paths"}:
            raise UsageError(
                f"{FLAG} {path}: it names its sources, and others are wanted: say which, with "
                "--last, --window-tokens, --iterations or --paths"
            )
    else:
        asked = _asked(path, value, words[0], verbs)
    rest = list(words[end:]) or ([REST, *_many(REST, asked[REST])] if REST in asked else [])
    kept = {key: each for key, each in asked.items() if key != REST and key not in replaced}
    return [*own, *(w for key in kept for w in _words(verb, key, kept[key])), *rest]


def dumped(arguments: argparse.Namespace) -> str:
    """What was typed, as a file for `--from`: every setting that is not its default, as YAML."""
    lines = [f"# pma {arguments.parser.prog.split()[-1]} {FLAG} THIS_FILE"]
    for action, value in _not_defaults(arguments):
        lines.append(f"{_key(action)}: {json.dumps(_plain(value))}")
    if arguments.rest:
        lines.append(f"{json.dumps(REST)}: {json.dumps(list(arguments.rest))}")
    return "\n".join(lines) + "\n"


def words_of(arguments: argparse.Namespace, left_out: Collection[str]) -> list[str]:
    """What was typed or asked for by a file, as words, without some settings."""
    found = ((a, v) for a, v in _not_defaults(arguments) if a.dest not in left_out)
    return [word for a, v in found for word in _words(arguments.parser, a.dest, _typed_value(v))]


def _typed_value(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else _plain(value)


def _not_defaults(arguments: argparse.Namespace) -> Iterator[tuple[argparse.Action, Any]]:
    verb: argparse.ArgumentParser = arguments.parser
    for action in verb._actions:
        value = getattr(arguments, action.dest, None)
        known = action.option_strings and action.dest not in (*_NOT_ASKED, "json", "verbose")
        if known and value is not None and value is not False and value != action.default:
            yield action, value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        plain = [_plain(each) for each in value]
        return [one for each in plain for one in (each if isinstance(each, list) else [each])]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _key(action: argparse.Action) -> str:
    return action.option_strings[-1].removeprefix("--").replace("-", "_")


def _without_from(words: Sequence[str]) -> tuple[list[str], Path | None]:
    own, path = [], None
    each = iter(words)
    for word in each:
        name, equals, value = word.partition("=")
        if name != FLAG:
            own.append(word)
            continue
        if path is not None:
            raise UsageError(f"{FLAG} is given twice: one file says what is asked for")
        said = value if equals else next(each, "")
        if not said:
            raise UsageError(f"{FLAG}: say which file")
        path = Path(said)
    return own, path


def _typed(words: Sequence[str], verb: argparse.ArgumentParser) -> Iterator[str]:
    """Settings of which a flag was typed, cut short or not."""
    for word in words:
        name = word.partition("=")[0]
        if name in verb._option_string_actions:
            yield verb._option_string_actions[name].dest
        elif name.startswith("--"):
            for flag, action in verb._option_string_actions.items():
                if flag.startswith(name):
                    yield action.dest


def _asked(
    path: Path, value: dict[str, Any], name: str, verbs: Mapping[str, argparse.ArgumentParser]
) -> dict[str, Any]:
    """Setting -> what the file says of it for one verb: for all, or below the verb's name."""
    settings, found = _settings(verbs[name]), {}
    below = {
        key: each  # `evaluate` is a command, and a setting of watch
        for key, each in value.items()
        if key in verbs and (isinstance(each, dict) or _spelled(key) not in settings)
    }
    for key, each in below.items():
        if not isinstance(each, dict):
            raise UsageError(f"{FLAG} {path}: {key} is a command: its settings follow below it")
    blocks = [("", value), (f"{name}.", below.get(name, {}))]
    if name in _ALSO:
        also = below.get(_ALSO[name], {})
        theirs = {k: v for k, v in also.items() if _spelled(k) not in _OF_ONE_MERGE}
        blocks.insert(1, (f"{_ALSO[name]}.", theirs))
    for prefix, said in blocks:
        for key, each in said.items():
            if not prefix and key in below:
                continue
            if key == REST or _spelled(key) in settings:
                found[settings.get(_spelled(key), key)] = each
            else:
                raise UsageError(_unknown(path, f"{prefix}{key}", name, verbs))
    return found


def _unknown(path: Path, key: str, name: str, verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    own = _spelled(key.rpartition(".")[2])
    users = [verb for verb in verbs if own in _settings(verbs[verb])]
    meant = nearest(own, list(_settings(verbs[name])))
    hint = "" if meant is None else f": did you mean {meant}?"
    if users:
        hint = f", but of {first_few(users, 3)}: put it below `{users[0]}:`"
    return f"{FLAG} {path}: {key} is no setting of pma {name}{hint}"


def _spelled(key: Any) -> str:
    return str(key).removeprefix("--").replace("-", "_")


def _settings(verb: argparse.ArgumentParser) -> dict[str, str]:
    """Name of a flag, as a file spells it -> the setting."""
    return {
        _spelled(flag): action.dest
        for flag, action in verb._option_string_actions.items()
        if flag.startswith("--") and action.dest not in _NOT_ASKED
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file, of which every value is text, a list, or a mapping.

    Raises:
        UsageError: there is none, or it is neither.
    """
    try:
        if path.name == MARKER_FILE and (path.parent / SEAL_FILE).is_file():
            from pma_megatron.formats.manifest import read_marker

            return dict(read_marker(path.parent).value)
        if path.suffix == ".json":
            return read_json(path)
        text = read_source_file(path, _MAX_BYTES).decode()
    except (CheckpointError, VerifyError, UnicodeDecodeError) as error:
        raise UsageError(f"{FLAG}: {error}") from error
    try:
        import yaml
    except ImportError:
        raise UsageError(
            f"{FLAG} {path}: YAML needs PyYAML, which is not installed: pip install "
            "'pma-megatron[yaml]', or write the same as JSON in a file called *.json"
        ) from None
    try:
        _refuse_repeats(path, yaml.compose(text, Loader=yaml.BaseLoader))
        value = yaml.load(text, Loader=yaml.BaseLoader)  # text as it stands: 1-sqrt, 8B, 1e-3
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())[:200]
        raise UsageError(f"{FLAG} {path} is no YAML: {where}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{FLAG} {path}: expected settings, `name: value` a line each")
    return value


def _refuse_repeats(path: Path, node: Any) -> None:
    """Of two settings of one name, YAML takes the later without a word."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    names = [_spelled(key.value) for key, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{FLAG} {path}: {name} is there twice: which one is meant?")
    for _, below in pairs:
        _refuse_repeats(path, below)


def _recorded(
    path: Path, value: Mapping[str, Any], verb: argparse.ArgumentParser, *, with_export: bool
) -> dict[str, Any]:
    """What a `pma.json` says that a merge was asked for, but for where its result went."""
    if value["provenance_version"] != PROVENANCE_VERSION:
        raise UsageError(
            f"{FLAG} {path}: version {value['provenance_version']!r}, expected "
            f"{PROVENANCE_VERSION}: another release wrote it"
        )
    left_out = {*_OF_ONE_RUN, *(() if with_export else _OF_EXPORT)}
    known = {action.dest for action in verb._actions} - left_out
    found = {}
    for each, said in _recorded_fields(MergeRequest, value.get("request")):
        if each.name in known:
            if each.field == "overrides" and isinstance(said, list):
                said = ["=".join(map(str, pair)) for pair in said if isinstance(pair, list)]
            found[each.name] = said
    if "sweep" in found:
        raise UsageError(
            f"{FLAG} {path}: it is of a sweep, which made several: type what is wanted"
        )
    if "load" not in found:
        raise UsageError(f"{FLAG} {path}: it is not of a merge, or damaged: it has no request")
    return found


def _recorded_fields(kind: type, value: Any) -> Iterator[tuple[Declared, Any]]:
    if not isinstance(value, dict):
        return
    for each in declared(kind):
        default = list(each.default) if isinstance(each.default, tuple) else each.default
        if each.setting.of and value.get(each.field, default) != default:
            yield each, value[each.field]
    for name, inner in nested(kind).items():
        yield from _recorded_fields(inner, value.get(name))


def _words(verb: argparse.ArgumentParser, key: str, value: Any) -> list[str]:
    """The words by which a setting is typed."""
    action = next(each for each in verb._actions if each.dest == key)
    flag, many = action.option_strings[-1], _many(key, value)
    if action.nargs == 0:
        said = [each.lower() for each in many]
        if said in (["true"], ["false"]):
            return [flag] if said == ["true"] else []
        raise UsageError(f"{FLAG}: {key} is true or false, got {str(value)[:100]!r}")
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={each}" for each in many]
    if action.nargs is None and len(many) > 1:
        raise UsageError(f"{FLAG}: {key} has {len(many)} values, expected one")
    return [f"{flag}={many[0]}"] if action.nargs is None else [flag, *many]


def _many(key: str, value: Any) -> list[str]:
    many = value if isinstance(value, list) else [value]
    if not many or not all(isinstance(each, (str, int, float)) for each in many):
        raise UsageError(
            f"{FLAG}: {key} is {str(value)[:100]!r}, expected a value, or a list of values"
        )
    return [str(each) for each in many]
