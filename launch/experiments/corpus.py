"""Text for larger models: documentation, RFCs and sources out of Debian's and Python's packages.

    python launch/experiments/corpus.py --list      # which packages, and their licences
    python launch/experiments/corpus.py             # into $PMA_LAB/text, over 100 MB of prose

Needs `apt-get` with Debian's keys, pip, and their registries; what apt is told to use on this
machine is neither read nor changed. Every document is in one part alone, training, validation or
test, by a hash of what it says; what says the same is taken once. Statements of copyright that come
with packages lie beside the texts. A byte is a token. Debian calls RFCs non-free, because their
licence forbids changed copies: the texts are for a machine to train on, not to pass on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import html.parser
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lab.text import TEST, TRAIN, VALIDATION, cache, runs

LEAST_BYTES = {"prose": 100_000_000, "code": 10_000_000}
"""Of text to train on; less says that registries could not be had, and replaces no text."""
MOST_BYTES = 12 << 20
"""Of one package, so that no subject is most of the text."""
_SHORTEST_BYTES = 512  # of a document
_PARTS = (*(TRAIN,) * 18, VALIDATION, TEST)
_SILENT = {"script", "style", "nav", "head", "svg", "button"}
_APART = {"p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "table", "ul"}

_DEBIAN = (
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} bookworm main non-free"
)
_MIRROR = "http://deb.debian.org/debian"

DOCUMENTATION = {
    "python3.11-doc": "PSF-2.0",
    "linux-doc-6.1": "GPL-2.0-only",
    "postgresql-doc-15": "PostgreSQL",
    "sqlite3-doc": "public domain",
    "rust-doc": "MIT OR Apache-2.0",
    "openjdk-17-doc": "GPL-2.0-only WITH Classpath-exception-2.0",
    "libboost1.74-doc": "BSL-1.0",
    "libstdc++-12-doc": "GFDL-1.3 AND GPL-3.0-or-later",
    "llvm-14-doc": "Apache-2.0 WITH LLVM-exception",
    "cmake-doc": "BSD-3-Clause",
    "git-doc": "GPL-2.0-only",
    "perl-doc": "GPL-1.0-or-later OR Artistic-1.0-Perl",
    "octave-doc": "GPL-3.0-or-later",
    "apache2-doc": "Apache-2.0",
    "nodejs-doc": "MIT",
    "python-django-doc": "BSD-3-Clause",
    "python-scipy-doc": "BSD-3-Clause",
    "python-sympy-doc": "BSD-3-Clause",
    "python-pandas-doc": "BSD-3-Clause",
    "debian-reference-en": "GPL-2.0-or-later",
    "developers-reference": "GPL-2.0-or-later",
    "debian-policy": "GPL-2.0-or-later",
    "doc-rfc-std": "IETF Trust: whole copies, unchanged",
    "doc-rfc-fyi-bcp": "IETF Trust: whole copies, unchanged",
}
"""Packages of Debian 12 -> the licence of what is taken."""
SOURCES = {
    "django": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sqlalchemy": "MIT",
    "transformers": "Apache-2.0",
}
"""Packages of the Python index -> their licence; what is taken are their modules."""


@dataclass
class Taken:
    """What was taken of a domain: bytes by part."""

    folder: Path
    domain: str

    def __post_init__(self) -> None:
        self.nbytes = dict.fromkeys((TRAIN, VALIDATION, TEST), 0)
        self.seen: set[bytes] = set()
        for part in self.nbytes:
            (self.folder / f"{self.domain}.{part}.new").write_bytes(b"")

    def add(self, documents: Iterable[str]) -> int:
        """Take a package's documents, each into its part; returns bytes."""
        total = 0
        for document in documents:
            data = document.encode("utf-8", "replace") + b"\n"
            digest = hashlib.blake2b(data, digest_size=8).digest()
            if len(data) < _SHORTEST_BYTES or digest in self.seen:
                continue
            self.seen.add(digest)
            part = _PARTS[int.from_bytes(digest, "little") % len(_PARTS)]
            with (self.folder / f"{self.domain}.{part}.new").open("ab") as stream:
                stream.write(data)
            self.nbytes[part] += len(data)
            total += len(data)
            if total >= MOST_BYTES:
                break
        return total

    def publish(self) -> None:
        """All parts are there, or none of them is new."""
        for part in self.nbytes:
            new = self.folder / f"{self.domain}.{part}.new"
            new.replace(new.with_suffix(".txt"))

    def discard(self) -> None:
        """As if nothing had been taken."""
        for part in self.nbytes:
            (self.folder / f"{self.domain}.{part}.new").unlink()


class _Words(html.parser.HTMLParser):
    """What a reader sees of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        if tag in _APART:
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(self._silent - (tag in _SILENT), 0)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)


def text_of(page: str) -> str:
    """The text of a page of HTML, without empty lines.

    >>> text_of("<head><title>no</title></head><p>One <b>word</b></p><script>x</script><p>two")
    'One word\\ntwo'
    """
    parser = _Words()
    parser.feed(page)
    lines = (line.rstrip() for line in "".join(parser.words).splitlines())
    return "\n".join(line for line in lines if line.strip())


def documents(folder: Path) -> Iterator[str]:
    """Every page and every plain text below a folder, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        if path.suffix in (".html", ".htm", ".xhtml"):
            yield text_of(path.read_text(errors="replace"))
        elif path.suffix in (".rst", ".txt", ".md", ".pod"):
            yield path.read_text(errors="replace")
        elif path.name.endswith(".txt.gz"):  # RFCs; those of HTML beside them say the same again
            yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def apt_get(folder: Path, mirror: str) -> list[str]:
    """The words of an `apt-get` that knows one mirror of Debian 12, and keeps all in a folder.

    What it has no list of cannot be downloaded, and is said then.
    """
    for name in ("lists", "cache"):
        (folder / name / "partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(_DEBIAN.format(mirror=mirror) + "\n")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    words = ["apt-get", "-qq", *(w for k, v in options.items() for w in ("-o", f"{k}={v}"))]
    with contextlib.suppress(FileNotFoundError):
        subprocess.run([*words, "update"], check=False)
    return words


def of_debian(name: str, work: Path, copyrights: Path, apt: Sequence[str]) -> Iterator[str]:
    """The documents of a package of Debian."""
    subprocess.run([*apt, "download", name], cwd=work, check=True)
    (archive,) = work.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, work / "files"], check=True)
    for path in (work / "files").rglob("copyright"):
        shutil.copy(path, copyrights / name)
    yield from documents(work / "files")


def of_python(name: str, work: Path, copyrights: Path) -> Iterator[str]:
    """The modules of a package of the Python index, and nothing that is compiled."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(work)]
    subprocess.run([*command, name], check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if "license" in member.lower() and ".dist-info/" in member:
                (copyrights / name).write_bytes(archive.read(member))
            if member.endswith(".py"):
                yield archive.read(member).decode("utf-8", "replace")


class TooLittleError(RuntimeError):
    """There is not enough text to train on."""


def take(
    folder: Path, domain: str, names: Iterable[str], of: Callable[[str, Path], Iterator[str]]
) -> Taken:
    """Take the documents of some packages; which could not be had is said."""
    taken = Taken(folder, domain)
    for name in names:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            try:
                nbytes = taken.add(of(name, Path(work)))
            except subprocess.CalledProcessError as error:  # which has told why
                print(f"{name}: not taken ({error.cmd[0]} failed)", file=sys.stderr)
                continue
            except FileNotFoundError as error:
                print(f"{name}: not taken ({error})", file=sys.stderr)
                continue
        print(f"{name}: {nbytes / 1e6:.1f} MB")
    return taken


def make(folder: Path, mirror: str = _MIRROR) -> dict[str, Taken]:
    """Take everything into a folder; what could not be had is said, and left out.

    Args:
        folder: of the texts.
        mirror: address of a mirror of Debian.

    Raises:
        TooLittleError: that was too much of it; texts are as they were before.
    """
    copyrights = folder / "copyright"
    copyrights.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as lists:
        apt = apt_get(Path(lists), mirror)
        debian = functools.partial(of_debian, copyrights=copyrights, apt=apt)
        made = {"prose": take(folder, "prose", DOCUMENTATION, debian)}
    python = functools.partial(of_python, copyrights=copyrights)
    made["code"] = take(folder, "code", SOURCES, python)
    little = [
        f"{domain}: {taken.nbytes[TRAIN] / 1e6:.1f} MB of text to train on, of at least "
        f"{LEAST_BYTES[domain] / 1e6:.0f}"
        for domain, taken in made.items()
        if taken.nbytes[TRAIN] < LEAST_BYTES[domain]
    ]
    for taken in made.values():
        taken.discard() if little else taken.publish()
    if little:
        raise TooLittleError("; ".join(little))
    return made


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="say which packages, and licences")
    parser.add_argument("--mirror", default=_MIRROR, help="of Debian, with main and non-free")
    chosen = parser.parse_args()
    if chosen.list:
        for name, licence in {**DOCUMENTATION, **SOURCES}.items():
            print(f"{name:22} {licence}")
        return 0
    if runs():
        parser.error(
            f"{runs()[0].parent} has runs, which were made with the text that is there: set "
            "PMA_LAB to a folder without any"
        )
    try:
        made = make(cache() / "text", chosen.mirror)
    except TooLittleError as error:
        print(f"corpus.py: {error}. Texts are as they were", file=sys.stderr)
        return 1
    for domain, taken in made.items():
        parts = ", ".join(f"{part} {n / 1e6:.1f} MB" for part, n in taken.nbytes.items())
        print(f"{domain}: {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
