"""For mkdocs: the Markdown files that live outside of docs/ become pages, and links from page to page go on working.

A link to a file that is no page, such as a source file, becomes the path of that file in the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/traces/README.md": "traces.md",
}  # by path in the repository: the page
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = Path(page.file.abs_src_path)

    def rewritten(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = os.path.relpath((source.parent / target).resolve(), ROOT)
        uri = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return f"{text} (`{path}`)"
        return f"{image}[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor or ''})"

    return _LINK.sub(rewritten, markdown)
