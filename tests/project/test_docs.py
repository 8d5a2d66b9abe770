"""Do the documentation's snippets run, is every page in the navigation, and does every link lead somewhere?"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXECUTED = ("index", "choosing", "conversions", "gradients", "methods")
LINK = re.compile(r"\]\(([^()\s]+)\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page: the number of the line before each block, and its text."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start()].count("\n") + 1, block[1]) for block in found]


def compiled(page: Path) -> list[Any]:
    """Each block compiled with the line numbers of the page, for error messages."""
    return [compile("\n" * line + source, str(page), "exec", dont_inherit=True) for line, source in blocks(page)]


@pytest.mark.parametrize("name", EXECUTED)
def test_snippets_run(name, tmp_path, monkeypatch):
    """The blocks of a page run in order in one namespace."""
    monkeypatch.chdir(tmp_path)
    code, names = compiled(DOCS / f"{name}.md"), {"__name__": "page"}
    assert code
    for block in code:
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_snippets_are_python(page):
    compiled(page)


def test_snippets_of_trainers_use_existing_names():
    """They need a model and data, so they do not run. But the names of otalign that they use must exist."""
    import otalign

    called = 0
    for _, source in blocks(DOCS / "trainers.md"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and (path := ast.unparse(node)).startswith("otalign."):
                target: Any = otalign
                for part in path.split(".")[1:]:
                    target = getattr(target, part)
                called += 1
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
    assert called


def files_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [file for entry in entries for file in files_of(entry)]


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files_of(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in LINK.findall(text) if not target.startswith(("http://", "https://"))]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_of_docstrings_become_html():
    """All formulas: an unknown command is an error, and no LaTeX is left over."""
    render, seen = hooks().rendered, 0
    for file in sorted((ROOT / "otalign").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node)
            if docstring is None or "math:" not in docstring:
                continue
            seen += 1
            formulas = re.findall(r'class="formula">(.*?)</(?:p|span)>', render(docstring))
            assert formulas and "math::" not in render(docstring) and ":math:" not in render(docstring)
            assert not any(mark in formula for formula in formulas for mark in "\\{}^_")
    assert seen


def test_formula():
    formula = hooks().formula
    assert formula(r"\tfrac12 \|x_i\|^2 + \rho_x \frac{a}{b + 1} c") == (
        "½ ‖x<sub>i</sub>‖<sup>2</sup> + ρ<sub>x</sub> (a / (b + 1)) c"
    )
    with pytest.raises(ValueError, match="unknown command"):
        formula(r"\oint x")


def test_docstrings_keep_their_angle_brackets():
    render = hooks().rendered
    assert render("The cost <P, C> of `<x, y>`.") == "The cost &lt;P, C> of `<x, y>`."
    assert render("Of one.\n\nExample:\n    >>> 1 < 2\n    True").endswith("Examples:\n    >>> 1 < 2\n    True")


def test_pictures_show_the_example_of_the_page():
    """docs/figures/make_choosing.py runs the first two blocks of the page, so these must define the names that it uses."""
    names: dict[str, Any] = {}
    for block in compiled(DOCS / "choosing.md")[:2]:
        exec(block, names)
    assert names["speech"].shape == (1, 60, 24) and names["text"].shape == (1, 12, 24)
    assert len(names["owner"]) == 60 and set(names["setting"]) == {"reg", "cost", "prior", "unbalanced"}
    assert torch.tensor(names["owner"]).max() == 11
