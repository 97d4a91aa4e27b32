"""Check the links of the project's markdown files: python3 scripts/check_links.py

A relative link must name a file or folder that exists, and its #anchor a heading of that file, spelled as GitHub
spells anchors. Links to other sites are not looked at. Exit code 1: the broken links are listed.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "examples/**/*.md")


def broken_links(files: Iterable[Path]) -> list[str]:
    """A message `file:line: target: reason` for each broken link."""
    return [f"{file}:{line}: {target}: {reason}" for file in files for line, target, reason in _broken_in(file)]


def anchors_of(file: Path) -> set[str]:
    """The anchors of a markdown file's headings; equal headings are numbered."""
    seen: Counter[str] = Counter()
    anchors = set()
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(file.read_text())
    for opening, title in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            words = "".join(part.content for part in title.children or ())
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
    return anchors


def _broken_in(file: Path) -> Iterator[tuple[int, str, str]]:
    for line, target in _links_of(file):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            continue
        place = file.parent / unquote(url.path) if url.path else file
        if not place.exists():
            yield line, target, "there is no such file"
        elif url.fragment and place.suffix == ".md" and unquote(url.fragment) not in anchors_of(place):
            yield line, target, "the file has no such heading"


def _links_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and target of each link and image; the line is that on which the paragraph or table row begins."""
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(file.read_text()):
        for part in token.children or ():
            target = part.attrGet("href") or part.attrGet("src")
            if isinstance(target, str):
                yield (token.map or (0, 0))[0] + 1, target


def main(root: Path = ROOT) -> int:
    broken = broken_links(file for pattern in DOCUMENTS for file in sorted(root.glob(pattern)))
    for line in broken:
        print(line.removeprefix(f"{root}/"))
    return 1 if broken else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
