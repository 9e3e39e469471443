"""The page of guarantees names tests, results and commands that there are."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
TESTS = (ROOT / "tests" / "README.md").read_text()


@cache
def _tests_in(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_test_that_a_guarantee_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", GUARANTEES)
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named
               if not (ROOT / file).exists() or name not in _tests_in(ROOT / file)]
    assert missing == []


def test_every_law_is_promised_and_has_a_row_among_the_tests() -> None:
    for law in range(1, 11):
        assert re.search(rf"^\| {law}\. .*`(tests/|make check)", GUARANTEES, re.MULTILINE), law
        assert re.search(rf"^\| {law}\. ", TESTS, re.MULTILINE), law


def test_every_file_and_command_that_these_pages_name_exists() -> None:
    for result in re.findall(r"`(\d{4}-\d\d-\d\d-[\w-]+\.json)`", GUARANTEES):
        assert (ROOT / "docs" / "results" / result).exists(), result
    for file in re.findall(r"`((?:laws|mesh|router|shared)/test_\w+\.py)`", TESTS):
        assert (ROOT / "tests" / file).exists(), file
    for module in re.findall(r"`python -m ([\w.]+)", GUARANTEES + TESTS):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    makefile = (ROOT / "Makefile").read_text()
    for word in re.findall(r"`make (\w+)", TESTS):
        assert re.search(rf"^{word}:", makefile, re.MULTILINE), word
