"""The field's words: a word of our own for something that has a name does not come back, in code, documents or messages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import DATA

ROOT = DATA.parent.parent
TEXT = {".cfg", ".cpp", ".h", ".ipynb", ".md", ".py", ".sh", ".toml", ".txt", ".yml", ""}
#: The changelog says what was called how, this file lists the words, and files of models are not ours to word.
LEFT_OUT = ("CHANGELOG.md", "tests/test_terms.py", "tests/data/", "examples/models/")


class Gone(NamedTuple):
    """A word that is gone, the one that is said instead, and lines in which it means something else or stays on purpose."""

    word: str
    instead: str
    finds: str
    """A line that the expression has to find."""
    passes: tuple[str, ...]
    """Lines that it must let pass."""
    where: str = r"."
    """The files it is looked for in."""


#: Old names of options, which keep working: the one place where each stands, and its test.
_INDUCTOR = ("ctfp8_compile/inductor/", "tests/inductor/test_backend.py")
OLD_OPTIONS = {'"ctfp8.join"': _INDUCTOR, '"codes"': _INDUCTOR, '"--dialect"': ("benchmarks/memory_load.py",)}

GONE = (
    Gone(r"\bside[ -]by[ -]side\b", "horizontal fusion; in turn", "matmuls are put side by side", ()),
    Gone(
        r"(?<![.\w])join(s|ed|ing)?\b(?!\()|(?<=_)joined\b|\bctfp8\.join\b|\b_?join_(linears|weights|scales)",
        "horizontal fusion, packed, fused",
        "the weights are joined; ctfp8.join; def _join_linears",
        ('", ".join(names)', "os.path.join(a, b)", "thread.join()", "def join_group(group)"),
    ),
    Gone(r"\blaid[ -]out\b", "prepacked", "scales laid out for fbgemm", ("the layout of rows",)),
    Gone(r"\bseldom\b", "paused garbage collection", "collects garbage seldom", ()),
    Gone(
        r"\b(in|read in|as) one run\b|\bone run through memory\b|\ba run of (rows|columns)\b",
        "streaming GEMV; a slice of rows",
        "a weight is read in one run",
        ("fresh processes of one run", "another run gave 27.4"),
    ),
    Gone(
        r"(?<!router )(?<!expert )(?<![a-z])gates?(?=[ _](says|answers|asks|declines|takes|refuses|accepts|lets|of (a|the) kernel))"
        r"|\bby (the|its|a|each|every) gate\b|\b(kernel|target)('s)? gates?\b|\bgates? and (a )?builders?\b",
        "eligibility check, predicate",
        "another pair is refused by the gate; def test_what_the_gates_answer",
        ("silu(self.gate(x)) * self.up(x)", "gate and up", "mlp.gate.weight", "the router's gate", "gate_proj"),
    ),
    Gone(
        r"\bpieces?\b",
        "slice of rows, part, graph",
        "each rank has a piece of every expert",
        (),
        where=r"^(?!ctfp8_compile/passes/(regions|region_calls|pieces)\.py|ctfp8_compile/ops/cpu/csrc/panel\.h)",  # parts of graphs; of a tile
    ),
    Gone(r"\bdialects?\b", "format", "the dialect of a file", ()),
    Gone(
        r"\b(fp8|nan)[ _-]codes?\b|\b(weight|activation)s?'?s? codes\b|\bcodes (of|and) (a |the )?(weight|scale|FP8)"
        r"|\"codes\"|'codes'",
        "FP8 value",
        "NaN codes are found",
        (
            "exit code",
            "source code of the weight's module",
            "C++ code",
            "Inductor's code cache",
            "[code] = run_and_get_code()",
        ),
    ),
    Gone(
        r"[\[(]code[\])]|\bcode (=|<|\*|&|\+)",
        "FP8 value, byte",
        "table[code]",
        ("// code for", "code;"),
        r"\.(h|cpp)$",
    ),
    Gone(
        r"(?<!\")decompress(?!\(dict|\(parts, scheme|\(pair, scheme)",  # their method, and a value of their quantization_status
        "dequantize",
        "weights are decompressed",
        ('compressor.decompress(parts, scheme)["weight"]', '"quantization_status": "decompressed"'),
    ),
    Gone(
        r"(?<!font-)(?<!the same )\bfamil(y|ies)\b",
        "architecture",
        "one file for each family of models",
        ("font-family: sans", "an assistant of the same family"),
    ),
    Gone(
        r"\boffs`? (are )?(their|its|the) ends\b|\bends of the experts\b", "cumulative offsets", "`offs` their ends", ()
    ),
)


def lines() -> list[tuple[str, int, str]]:
    """Each line of text that git tracks, and that is ours to word: `(path, number, line)`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git working tree")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if not name or path.suffix not in TEXT or name.startswith(LEFT_OUT) or not path.is_file() or path.is_symlink():
            continue
        found += [(name, i, line) for i, line in enumerate(path.read_text().splitlines(), 1)]
    return found


@pytest.fixture(scope="module")
def tree() -> list[tuple[str, int, str]]:
    found = lines()
    assert len(found) > 20_000
    return found


def _without_old_options(path: str, line: str) -> str:
    for option, homes in OLD_OPTIONS.items():
        line = line.replace(option, "") if path.startswith(homes) else line
    return line


@pytest.mark.parametrize("gone", GONE, ids=lambda gone: gone.instead.partition(",")[0])
def test_no_word_that_is_gone_stands_in_the_tree(gone: Gone, tree: list[tuple[str, int, str]]) -> None:
    word, where = re.compile(gone.word, re.IGNORECASE), re.compile(gone.where)
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, number, line in tree
        if where.search(path) and word.search(_without_old_options(path, line))
    ]
    assert not found, f"write {gone.instead}"


@pytest.mark.parametrize("gone", GONE, ids=lambda gone: gone.instead.partition(",")[0])
def test_the_expressions_find_what_they_are_for(gone: Gone) -> None:
    word = re.compile(gone.word, re.IGNORECASE)
    assert word.search(gone.finds)
    assert not [line for line in gone.passes if word.search(line)]


def test_the_old_options_still_stand_where_they_are_read(tree: list[tuple[str, int, str]]) -> None:
    for option, homes in OLD_OPTIONS.items():
        found = {path for path, _, line in tree if option in line}
        assert any(path.startswith(homes[0]) for path in found), option
        assert all(path.startswith(homes) for path in found), found


def test_file_names_hold_the_words_too() -> None:
    names = [Path(path).stem.replace("_", " ").replace("-", " ") for path in sorted({path for path, _, _ in lines()})]
    assert not [
        name for name in names for gone in GONE if re.search(gone.word, name, re.IGNORECASE) and gone.where == "."
    ]
