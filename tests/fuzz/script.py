"""Failing cases as scripts that reproduce them, and the corpus of those that once failed."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import fields
from pathlib import Path

from .case import Case

CORPUS = Path(__file__).parent / "corpus"

SCRIPT = '''"""{message}"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = [{backend!r}]
CASE = {case}

if __name__ == "__main__":  # python -m tests.fuzz.replay FILE, from the project's folder
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
'''


def changes(case: Case) -> dict[str, object]:
    """The fields that differ from those of the simplest case."""
    return {
        field.name: getattr(case, field.name)
        for field in fields(Case)
        if repr(getattr(case, field.name)) != repr(field.default)
    }


def simplest(failing: list[tuple[Case, str]]) -> tuple[Case, str]:
    """The case with the fewest points, and then the shortest description."""
    return min(failing, key=lambda pair: (sum(pair[0].x_lengths + pair[0].y_lengths), len(repr(changes(pair[0])))))


def source(case: Case) -> str:
    return "Case(\n" + "".join(f"    {name}={value!r},\n" for name, value in changes(case).items()) + ")"


def write_script(folder: Path, case: Case, backend: str, message: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = source(case)
    name = hashlib.sha256((backend + text).encode()).hexdigest()[:10]
    path = folder / f"{backend}_{name}.py"
    path.write_text(
        SCRIPT.format(message=message.replace("\\", "").replace('"""', "")[:600], backend=backend, case=text)
    )
    return path


def load(path: Path) -> tuple[Case, list[str]]:
    """The case of a script, and the backends that it is for."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASE, module.BACKENDS
