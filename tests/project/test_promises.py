"""Does each promise of docs/promises.md name tests that exist?"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/promises.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_each_promise_names_tests_that_exist():
    assert len(NAMED) > 20
    for file, function in NAMED:
        names = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert function in names, f"{file}::{function}"


def test_no_promise_is_without_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]
    assert rows
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row), row
