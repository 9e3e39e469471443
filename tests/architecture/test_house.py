"""The house as it stands equals the house as it is told."""

import re
import shutil
import subprocess
from pathlib import Path

from shared.permissions import table

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "router", "worker", "drafter", "shared", "kernels", "deploy")
MADE_HERE = {".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}


def _files() -> list[str]:
    """Every file of the project: what git tracks, or all there is in a copy without git."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    here = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(path) for path in here if not MADE_HERE & set(path.parts)]


def test_nothing_stands_at_the_top_but_what_the_design_names() -> None:
    allowed = {
        *PACKAGES,
        "tests",
        "docs",
        ".ci",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        ".gitignore",
    }
    assert {name.split("/")[0] for name in _files()} <= allowed


def test_the_readme_maps_every_top_level_folder_and_names_none_that_is_missing() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^\| `([a-z]+)/` \|", readme, re.MULTILINE))
    assert named == {*PACKAGES, "tests", "docs"}
    for target in re.findall(r"\]\((docs/[^)#]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_the_architecture_page_has_one_line_for_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^\| `([a-z0-9_/]+\.(?:py|cpp|hpp))` \|", page, re.MULTILINE))
    sources = [name for name in _files() if name.split("/")[0] in PACKAGES and name.endswith((".py", ".cpp", ".hpp"))]
    real = {name for name in sources if not name.endswith("__init__.py")}
    assert named == real


def test_the_security_page_has_the_permissions_as_they_are() -> None:
    page = (ROOT / "docs" / "SECURITY.md").read_text()
    shown = page.partition("<!-- permissions -->\n")[2].partition("\n<!-- /permissions -->")[0]
    assert shown.splitlines() == table()


def test_every_module_says_what_it_is() -> None:
    for name in _files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            assert (ROOT / name).read_text().lstrip().startswith('"""'), f"{name} has no docstring"


def test_services_do_not_import_time() -> None:
    for name in _files():
        if name.split("/")[0] in ("gateway", "router", "worker", "drafter") and name.endswith(".py"):
            assert not re.search(r"^(import time|from time )", (ROOT / name).read_text(), re.MULTILINE), name


def test_tests_are_no_package() -> None:
    assert not [name for name in _files() if name.startswith("tests/") and name.endswith("__init__.py")]
