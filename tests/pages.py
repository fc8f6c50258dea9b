"""The pages of the documentation, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "zoo" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCED = re.compile(r"(?:<!-- not run: ([^>]+) -->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.+\n)+")
INLINE = re.compile(r"(?<!`)`(divqat [a-z]+ [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: its name, such as ``docs/results.md``.
        language: ``python`` or ``bash``; indented blocks are commands.
        code: its text.
        reason: why it cannot run in the tests, from a comment above it: None if it can.
    """

    page: str
    language: str
    code: str
    reason: str | None


def blocks() -> list[Block]:
    """The blocks of all pages, in order."""
    found = []
    for path in PAGES:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found += [Block(page, m[2], m[3], m[1]) for m in FENCED.finditer(text)]
        for match in INDENTED.finditer(FENCED.sub("", text)):
            found.append(Block(page, "bash", re.sub(r"^ {4}", "", match[0], flags=re.M), None))
    return found


def commands() -> list[tuple[str, str]]:
    """Page and text of each command line: of the blocks, and of texts between backticks that name
    an output folder. Lines that end in a backslash are joined, variables of the shell replaced."""
    found = []
    for block in blocks():
        if block.language != "bash":
            continue
        variables: dict[str, str] = {}
        for line in block.code.replace("\\\n", " ").splitlines():
            assignment = re.fullmatch(r'([A-Z]+)="(.*)"', line)
            if assignment:
                variables[assignment[1]] = assignment[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append((block.page, line))
    for path in PAGES:
        text = FENCED.sub("", path.read_text(encoding="utf-8"))
        for match in INLINE.finditer(text):
            if "--out" in match[1] and "…" not in match[1]:
                found.append((path.relative_to(ROOT).as_posix(), " ".join(match[1].split())))
    return found
