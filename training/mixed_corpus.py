"""Text of eight kinds as tokens: what ``train_routing.py`` trains on, and text of each kind that it never sees.

    python training/mixed_corpus.py build/mixed.tar.xz

Prose, manuals, three programming languages and manuals in three other languages, from packages whose licences are
free: ``KINDS`` names them, and the archive's ``about.json`` their versions. Every 32nd document, by a checksum of its
name, is held out. The tokenizer, byte-level BPE, is trained on a part of the text that is not held out.

Members: train.u16 and held_out/KIND.u16 (little-endian uint16 tokens, each document followed by token 0),
tokenizer.json, about.json. Needs what ``packages.py`` needs, and the package ``tokenizers``.
"""

import argparse
import gzip
import html
import io
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from corpus import NOVELS, PLAYS, novels, plays
from packages import debian_package, debian_version, wheel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 16_384
END = "<|end|>"  # token 0, after each document
KIND_BYTES = 16 << 20  # at most, of each kind's text for training
HELD_OUT_BYTES = 1 << 20  # at most, of each kind
LEARN_BYTES = 3 << 20  # of each kind's text the tokenizer learns from
SHORTEST = 400  # characters of a document

Documents = Iterator[tuple[str, str]]  # name, text


class Source(NamedTuple):
    """One package: a Debian package, or a wheel if ``name`` states a version with ``==``."""

    name: str
    licence: str
    read: Callable[[Path], Documents]  # of the folder with the package's files


def files(pattern: str, plain: Callable[[str], str] = str, without: str = "$^") -> Callable[[Path], Documents]:
    """The files of a package whose paths match ``pattern`` and have no match of ``without``, as text by ``plain``."""

    def read(folder: Path) -> Documents:
        for path in sorted(folder.glob(pattern)):
            name = str(path.relative_to(folder))
            if path.is_file() and not path.is_symlink() and not re.search(without, name):
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="ignore")
                yield name, plain(text).strip()

    return read


def page(text: str) -> str:
    """What is between the tags of a HTML page, without the lists around it."""
    body = re.sub(r"(?s)<(script|style|nav|head|aside)\b.*?</\1>|<!--.*?-->", "", text)
    lines = html.unescape(re.sub(r"<[^>]*>", "", body)).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def manual_page(text: str) -> str:
    """A manual page without its macros and changes of font."""
    text = re.sub(r"(?m)^[.']\\?\".*\n|^\.(PP|TP|RS|RE|IP|P|nf|fi|EX|EE|br|sp|PD|ad|ie|el|if).*\n", "", text)
    text = re.sub(r"(?m)^\.[A-Z]{1,3} ", "", text)
    text = re.sub(r"\\f(\[[A-Z]*\]|\(..|.)|\\[,/&|]", "", text)
    return re.sub(r"\\\((..)", " ", text).replace("\\-", "-").replace("\\e", "\\").replace('"', "")


def works(read: Callable[[Path], Iterator[str]], kind: str, heading: str) -> Callable[[Path], Documents]:
    """Whole works cut at their headings, so that some chapters of each can be held out."""

    def pieces(folder: Path) -> Documents:
        for number, work in enumerate(read(folder.parent)):
            for place, piece in enumerate(re.split(heading, work)):
                yield f"{kind} {number}, {place}", piece.strip()

    return pieces


def language(code: str) -> tuple[Source, ...]:
    """What is there in a language other than English: the help of an office suite, and manual pages."""
    return (
        Source(f"libreoffice-help-{code}", "MPL-2.0", files("usr/share/libreoffice/help/*/text/**/*.html", page)),
        Source(f"manpages-{code}", "GPL-3+ and others", files("usr/share/man/*/man*/*.gz", manual_page)),
    )


KINDS: dict[str, tuple[Source, ...]] = {
    "prose": (
        Source(NOVELS, "public domain", works(novels, "novel", r"\n\n(?=(?:CHAPTER|Chapter) )")),
        Source(PLAYS, "public domain", works(plays, "play", r"\n\n(?=(?:ACT|SCENE|Act|Scene) )")),
        Source("anarchism", "GFDL-1.1+ or GPL-2+", files("usr/share/doc/anarchism/markdown/*.gz")),
    ),
    "manuals": (
        Source("linux-doc-6.12", "GPL-2", files("usr/share/doc/*/html/_sources/**/*.txt", without="translations/")),
        Source("python3.11-doc", "PSF-2.0", files("usr/share/doc/python3.11/html/_sources/**/*.txt")),
    ),
    "python": (
        Source("libpython3.11-stdlib", "PSF-2.0", files("usr/lib/python3.11/**/*.py")),
        Source("Django==5.2", "BSD-3-Clause", files("django/**/*.py", without="conf/locale/|/migrations/")),
        Source("sympy==1.14.0", "BSD-3-Clause", files("sympy/**/*.py", without="rubi/|_generated")),
    ),
    "go": (Source("golang-1.19-src", "BSD-3-Clause", files("usr/share/go-1.19/src/**/*.go", without="testdata/")),),
    "rust": (
        Source("rust-src", "MIT or Apache-2.0", files("usr/src/*/[cl]*/**/*.rs", without="/core_arch/|stdarch/")),
    ),
    "german": language("de"),
    "french": language("fr"),
    "spanish": language("es"),
}


class Kind(NamedTuple):
    train: list[str]
    held_out: list[str]


def unpacked(source: Source, folder: Path) -> Path:
    """The folder of the source's files; ``novels`` and ``plays`` download for themselves."""
    if source.name in (NOVELS, PLAYS):
        return folder / source.name
    return wheel(source.name, folder) if "==" in source.name else debian_package(source.name, folder)


def collected(sources: tuple[Source, ...], folder: Path) -> tuple[Kind, list[dict[str, str]]]:
    """The documents of one kind, sorted by their checksums and bounded as above; and the packages they are from."""
    documents: list[tuple[int, str]] = []
    about = []
    for source in sources:
        found = [
            (zlib.crc32(f"{source.name} {name}".encode()), text)
            for name, text in source.read(unpacked(source, folder))
            if len(text) >= SHORTEST
        ]
        if not found:
            raise SystemExit(f"{source.name}: nothing in this package is a document")
        documents += found
        version = source.name.partition("==")[2] or debian_version(source.name, folder)
        about.append({"package": source.name.partition("==")[0], "version": version, "licence": source.licence})
    documents.sort()
    held_out = [text for check, text in documents if check % 32 == 0]
    train = [text for check, text in documents if check % 32]
    return Kind(within(train, KIND_BYTES), within(held_out, HELD_OUT_BYTES)), about


def within(texts: list[str], nbytes: int) -> list[str]:
    """The first texts that have so many bytes together, at most."""
    kept, total = [], 0
    for text in texts:
        total += len(text.encode())
        if total > nbytes:
            break
        kept.append(text)
    return kept


def learned_tokenizer(kinds: dict[str, Kind]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for kind in kinds.values() for text in within(kind.train, LEARN_BYTES)), trainer
    )
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    encoded = (tokenizer.encode_batch_fast([text]) for text in texts)
    return np.concatenate([np.array([*one[0].ids, 0], dtype="<u2") for one in encoded])


def write_archive(archive: Path, kinds: dict[str, Kind], about: dict[str, dict[str, Any]]) -> None:
    """Learns the tokenizer and writes the archive; what is counted of each kind is added to ``about`` and printed."""
    tokenizer = learned_tokenizer(kinds)
    members: dict[str, bytes] = {"tokenizer.json": tokenizer.to_str().encode()}
    train = []
    for name, kind in kinds.items():
        train.append(tokens(tokenizer, kind.train))
        held_out = tokens(tokenizer, kind.held_out)
        members[f"held_out/{name}.u16"] = held_out.tobytes()
        counted = {
            "train_documents": len(kind.train),
            "train_bytes": sum(len(text.encode()) for text in kind.train),
            "train_tokens": len(train[-1]),
            "held_out_documents": len(kind.held_out),
            "held_out_bytes": sum(len(text.encode()) for text in kind.held_out),
            "held_out_tokens": len(held_out),
        }
        about[name] |= counted
        print(f"{name}:", ", ".join(f"{key} {value:,}" for key, value in counted.items()), flush=True)
    members["train.u16"] = np.concatenate(train).tobytes()
    members["about.json"] = json.dumps(about, indent=1).encode()
    with tarfile.open(archive, "w:xz") as written:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the .tar.xz to write")
    archive: Path = parser.parse_args().archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    kinds, about = {}, {}
    with tempfile.TemporaryDirectory() as downloads:
        for name, sources in KINDS.items():
            kinds[name], packages = collected(sources, Path(downloads))
            about[name] = {"packages": packages}
    write_archive(archive, kinds, about)
    print(f"{archive}: {archive.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
