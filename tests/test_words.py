"""One word for one thing: the former words of the project are gone from names, settings and sentences for users."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

from fvdm.config import FORMER_NAMES

ROOT = Path(__file__).parent.parent
TOP = ("fvdm", "data_prep", "launchers", "benchmarks")
SOURCES = sorted(path for folder in TOP for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")])
PAGES += sorted(ROOT.glob("configs/**/*.yaml"))

NAMES = {
    *("Wish", "wish", "want", "wanted", "How", "how", "told", "Recipe", "recipe", "Use", "matrix", "matrices"),
    *("walk", "fresh", "known", "Past", "half", "kept", "begins", "changes", "recompute", "twin", "twins"),
    *("whole", "why_broken", "patiently", "WAITS", "PATIENCE", "only_one", "_explained", "_nothing"),
    *("offer", "answer", "adopt", "_adopt", "into", "odd", "about", "said", "trouble", "passed", "Writer"),
    *("RollCall", "roll_call", "hung", "clip_from", "mend", "_mend"),
}
PHRASES = re.compile(
    r"\b(mirrored twins?|damaged|why_broken|patiently|lives? through|tells? beforehand|made again|mend(s|ed|ing)?"
    r"|pictures?|so-many-th|trainings|an? training(?! (run|step|loop|batch|clip|video|example|set|split|loss|image"
    r"|job|time|process|script|command|sample|data|stride|state|seed|config))|what (it|they) (is|are) made of is told"
    r"|recompute: |whole (checkpoint|file|or not at all)|time ?step matri(x|ces)|roll call)\b",
    re.IGNORECASE,
)
MATRIX = re.compile(r"\bmatri(x|ces)\b(?! (square root|product|rate|multipl|unit|of a|in the box))", re.IGNORECASE)


def names(path: Path) -> set[str]:
    """Names that a file defines: variables, arguments, functions, classes, attributes, keyword arguments."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            found.add(node.attr)
    return {name for name in found if name}


def sentences(path: Path) -> list[tuple[int, str]]:
    """Strings and comments of a file, with their lines."""
    with path.open("rb") as file:
        kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
        return [(token.start[0], token.string) for token in tokenize.tokenize(file.readline) if token.type in kinds]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_former_word_is_a_name(path):
    assert not names(path) & NAMES


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_former_word_is_in_a_sentence(path):
    lines = sentences(path) if path.suffix == ".py" else list(enumerate(path.read_text().splitlines(), start=1))
    former = {repr(name) for name in FORMER_NAMES} | {f'"{name}"' for name in FORMER_NAMES}
    found = [
        f"line {number}: {match[0]!r} in {text.strip()[:100]!r}"
        for number, text in lines
        if text not in former
        for pattern in (PHRASES, MATRIX)
        for match in pattern.finditer(text)
    ]
    assert not found, "\n".join(found)
