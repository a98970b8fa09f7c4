"""What mkdocs does while it builds the site (mkdocs.yml names this file).

README, CONTRIBUTING and other files outside of docs/ become pages of the site, and the flags of the
parsers become two reference pages, so that nothing is written twice. Links are written for GitHub;
here they are turned into those of the site. Where one leads to a file that the site does not have,
only its words are kept.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pma_megatron.cli.flags import parser
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.flags import USED_BY

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "patches/README.md": "patches.md",
    "launch/bench/README.md": "benchmark.md",
    "launch/attack/README.md": "attacks.md",
}
"""Files of the repository outside of docs/, and what the site calls them."""
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    for name, content in {
        "reference/command-line.md": command_line(),
        "reference/megatron-flags.md": megatron_flags(),
    }.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that GitHub follows into those of the site."""
    name = page.file.src_uri
    source = {site: path for path, site in PAGES.items()}.get(name, f"docs/{name}")
    lines, code = [], False
    for line in markdown.split("\n"):
        code ^= bool(_FENCE.match(line))
        lines.append(line if code else _linked(line, source, name))
    return "\n".join(lines)


def _linked(line: str, source: str, page: str) -> str:
    """One line of prose with its links changed."""

    def changed(found: re.Match[str]) -> str:
        to, _, anchor = found["to"].partition("#")
        if not to or "://" in to:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), to))
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return found["text"]
        way = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{found['image']}[{found['text']}]({way}{'#' + anchor if anchor else ''})"

    return _LINK.sub(changed, line)


def command_line() -> str:
    """The page of every command: what it is for, how it is called, its flags."""
    lines = [
        "# Command line",
        "",
        "This page has every command of `pma` with every flag; it is made from the command's own "
        "parser. `python -m pma_megatron` is the same program; under "
        "`torchrun ... -m pma_megatron` several ranks share the work.",
        "",
        "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 128 + n stopped by signal n.",
    ]
    for name, verb in verbs().items():
        lines += ["", f"## pma {name}", "", _cell(verb.description)]
        for group in verb._action_groups:
            actions = [action for action in group._group_actions if action.dest != "help"]
            if actions:
                lines += ["", f"**{(group.title or '').capitalize()}**", "", *_table(actions)]
        if verb.epilog:
            lines += ["", "Examples:", "", "```", *_examples(verb.epilog), "```"]
    return "\n".join(lines) + "\n"


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parsers of `pma merge` and the other commands, by name."""
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def megatron_flags() -> str:
    """The page of the flags that a Megatron script gets."""
    both = argument_parser.add_arguments, argument_parser.add_deepspeed_arguments
    made, others = (add(argparse.ArgumentParser(add_help=False))._actions for add in both)
    shared = {action.dest for action in others}
    lines = [
        "# Megatron flags",
        "",
        "This page has every flag that `python -m pma_megatron.launch SCRIPT` or a "
        "[patch](../patches.md) adds to a Megatron training script; it is made from the package's "
        "own definition of them. The guides explain them: [PMA-init](../pma-init.md), "
        "[running average](../online-average.md), [snapshots](../snapshots.md), "
        "[spike recovery](../recovery.md), [evaluation](../simulator.md). A flag with an entry "
        "under *used by* is refused unless one of those is given too.",
        "",
        "| flag | what it does | used by | in Megatron-DeepSpeed |",
        "|---|---|---|---|",
    ]
    for action in made:
        users = ", ".join(f"`--{name.replace('_', '-')}`" for name in USED_BY.get(action.dest, ()))
        there = "yes" if action.dest in shared else "no"
        lines.append(f"| {_spelled(action)} | {_cell(action.help)} | {users} | {there} |")
    return "\n".join(lines) + "\n"


def _table(actions: Iterable[argparse.Action]) -> list[str]:
    rows = [f"| {_spelled(action)} | {_cell(action.help)} |" for action in actions]
    return ["| flag | what it does |", "|---|---|", *rows]


def _spelled(action: argparse.Action) -> str:
    """An option with its values, as `--help` writes them."""
    if not action.option_strings:
        return f"`{action.dest}`"
    if action.nargs == 0:
        return ", ".join(f"`{flag}`" for flag in action.option_strings)
    value = action.metavar or action.dest.upper()
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = f"{value} ..." if action.nargs == "+" else value
    return ", ".join(f"`{flag} {value}`" for flag in action.option_strings)


def _cell(text: str | None) -> str:
    """A help text as Markdown that says the same."""
    escaped = (text or "").replace("%%", "%").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("*", "\\*")


def _examples(epilog: str) -> list[str]:
    lines = epilog.removeprefix("examples:").strip("\n").split("\n")
    return [line.removeprefix("  ") for line in lines]
