"""What the pages name exists: files, links, flags of the commands; and every table has its columns."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
FOLDERS = ("megatron_longpo", "tools", "benchmarks", "examples", "tests", "docs")
SOURCES = {
    "tools/benchmark_conversion.py": ["benchmarks/conversion.py"],
    "tools/benchmark_generation.py": ["benchmarks/generation/run.py"],
    "tools/benchmark_step.py": ["benchmarks/step/run.py"],
    "tools/convert_checkpoint.py": ["megatron_longpo/convert_checkpoint.py"],
    "tools/generate_pairs.py": ["megatron_longpo/generation/flags.py"],
    "tools/lengthen_model.py": ["megatron_longpo/generation/long_model.py"],
    "benchmarks.gpu": ["benchmarks/gpu/__main__.py"],
    "benchmarks.memory": ["benchmarks/memory.py"],
}
"""Where a program declares its flags, if not in the script itself."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_folders_that_are_named_exist(page: Path) -> None:
    for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", page.read_text()):
        if path.startswith("megatron_longpo/") or (ROOT / path).suffix:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_have_as_many_cells_in_every_row(page: Path) -> None:
    rows: list[str] = []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, rows[:1]
        assert not rows or re.fullmatch(r"\|( ?:?-+:? ?\|)+", rows[1]), rows[:2]
        rows = []


def commands(page: Path) -> list[list[str]]:
    """The indented Python and torchrun command lines, continuation lines joined."""
    lines = re.findall(r"^    (.*)", page.read_text().replace("\\\n", " "), re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"\S*(python3?|torchrun) ", line)]
    return [[word for word in line if word != "…"] for line in words]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_the_flags_that_they_are_given(page: Path) -> None:
    for words in commands(page):
        if "pretrain_longpo.py" in words:
            parse_arguments(words[words.index("pretrain_longpo.py") + 1 :])
            continue
        program = words[2] if words[1] == "-m" else words[1]
        if program in ("pip", "pytest"):
            continue
        files = SOURCES.get(program, [program if program.endswith(".py") else program.replace(".", "/") + ".py"])
        declared = "".join((ROOT / file).read_text() for file in files)
        for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert f'"{flag}"' in declared, (program, flag)


def test_every_make_target_that_is_named_is_one() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for page in PAGES for target in re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert named <= targets
