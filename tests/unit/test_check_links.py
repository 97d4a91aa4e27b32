"""The link check: what it must find, and what it must leave alone."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts/check_links.py"))

OTHER = "# Several machines\n\n## `verl.doctor`: what it checks\n\n## Limits\n\n## Limits\n"


def found(folder: Path, text: str) -> list[str]:
    (folder / "other.md").write_text(OTHER)
    (folder / "page.md").write_text(text)
    return SCRIPT["broken_links"]([folder / "page.md"])


@pytest.mark.parametrize(
    "link",
    [
        "[a](other.md)", "[a](./other.md#several-machines)", "[a](other.md#verldoctor-what-it-checks)",
        "[a](other.md#limits-1)", "[a](#here)", "[a][ref]\n\n[ref]: other.md", "[a](https://example.org/none.md#none)",
        "`[a](none.md)`", "```\n[a](none.md)\n```", "![picture](other.md)",
    ],
)  # fmt: skip
def test_a_link_with_a_target_passes(tmp_path, link):
    assert found(tmp_path, f"# Here\n\n{link}\n") == []


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("[a](none.md)", "no such file"),
        ("[a](none.md#several-machines)", "no such file"),
        ("![a](none.png)", "no such file"),
        ("[a][ref]\n\n[ref]: none.md", "no such file"),
        ("| a |\n|---|\n| [a](none.md) |", "no such file"),
        ("[a](other.md#several)", "no such heading"),
        ("[a](other.md#limits-2)", "no such heading"),
        ("[a](#there)", "no such heading"),
    ],
)
def test_a_broken_link_is_listed_with_its_line(tmp_path, link, reason):
    (line,) = found(tmp_path, f"# Here\n\n{link}\n")
    number = 5 if link.startswith("|") else 3
    assert line.startswith(f"{tmp_path}/page.md:{number}: ") and reason in line


def test_the_program_looks_at_the_documents_and_fails_on_a_broken_link(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[design](docs/design.md)\n")
    (tmp_path / "docs/design.md").write_text("[back](../README.md)\n")
    assert SCRIPT["main"](tmp_path) == 0
    (tmp_path / "docs/design.md").write_text("[back](README.md)\n")
    assert SCRIPT["main"](tmp_path) == 1
    assert capsys.readouterr().out == "docs/design.md:1: README.md: there is no such file\n"
