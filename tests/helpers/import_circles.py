"""The imports between the package's modules, read from their source, and the circles among them.

    python tests/helpers/import_circles.py    # prints the tree of imports, then the circles if there are any

An import counts wherever it stands: at the top of a module, inside a function, or as `importlib.import_module` with constant
names. Imports for type checkers alone are kept apart: they never run. `from . import x` is an import of the module `x` if there is
one, else of the package. That importing `a.b` runs the package `a` first does not count: Python does it for every module.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = {"otalign": ROOT / "otalign", "otalign.triton_kernels": ROOT / "triton_kernels"}

TOP, FUNCTION, TYPES = "top", "function", "types"  # where an import stands; TYPES never runs


class Import(NamedTuple):
    """`module` imports `target` at `line` of its source."""

    module: str
    target: str
    line: int
    place: str

    def __str__(self) -> str:
        return f"{self.module} imports {self.target} (line {self.line})"


def sources(packages: Mapping[str, Path] = PACKAGES) -> dict[str, Path]:
    """The file of every module, by the module's name; of a compiled module its stub."""
    found = {}
    for package, folder in packages.items():
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports(files: Mapping[str, Path]) -> list[Import]:
    """Those between the modules `files`, each pair once a place, at its first line."""
    first: dict[tuple[str, str, str], Import] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node, place in statements(ast.parse(path.read_text(encoding="utf-8")), TOP):
            for name in names(node, module, package, files):
                if name in files:
                    first.setdefault((module, name, place), Import(module, name, node.lineno, place))
    return list(first.values())


def statements(node: ast.AST, place: str) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Every import, and every call, under `node`, and where it stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Call)):
            yield child, place
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for part, where in [(child.body, TYPES), (child.orelse, place)]:
                yield from statements(ast.Module(part, []), where)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and place == TOP
            yield from statements(child, FUNCTION if inside else place)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def names(node: ast.stmt | ast.expr, module: str, package: str, files: Mapping[str, Path]) -> list[str]:
    """The full names of what an import or a call imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        inner = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in files else base for name in inner]
    if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if called in ("import_module", "__import__") and arguments:
            name, anchor = (constant(part, module, package) for part in [*arguments, arguments[0]][:2])
            if name is not None and (anchor is not None or not name.startswith(".")):
                return [importlib.util.resolve_name(name, anchor)]
    return []


def constant(node: ast.expr, module: str, package: str) -> str | None:
    """The string that an expression is, if its source says so."""
    if isinstance(node, ast.Name):
        return {"__package__": package, "__name__": module}.get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def circles(found: list[Import]) -> list[list[Import]]:
    """A shortest circle through every import that is part of one, each circle once."""
    edges = graph(found)
    seen, result = set(), []
    for edge in found:
        back = path(edges, edge.target, edge.module)
        if back is not None:
            circle = [edge, *back]
            key = frozenset(step.module for step in circle)
            if key not in seen:
                seen.add(key)
                result.append(circle)
    return result


def graph(found: list[Import]) -> dict[str, list[Import]]:
    """The imports of every module."""
    edges: dict[str, list[Import]] = {}
    for edge in found:
        edges.setdefault(edge.module, []).append(edge)
    return edges


def path(edges: Mapping[str, list[Import]], start: str, end: str) -> list[Import] | None:
    """The fewest imports that lead from `start` to `end`; None if none do."""
    ways: dict[str, list[Import]] = {start: []}
    queue = [start]
    for module in queue:
        if module == end:
            return ways[module]
        for edge in edges.get(module, []):
            if edge.target not in ways:
                ways[edge.target] = [*ways[module], edge]
                queue.append(edge.target)
    return None


def run_time(found: list[Import]) -> list[Import]:
    return [edge for edge in found if edge.place != TYPES]


def describe(circle: list[Import]) -> str:
    return "\n".join(f"  {edge}" for edge in circle)


def tree(found: list[Import], modules: list[str]) -> Iterator[str]:
    """A line for each import, indented under the module that makes it. Each module is spelled out once, where it comes first."""
    edges, spelled_out = graph(found), set()
    notes = {TOP: "", FUNCTION: "  (inside a function)", TYPES: "  (for types)"}

    def branch(module: str, depth: int, note: str) -> Iterator[str]:
        again = module in spelled_out and module in edges
        yield "  " * depth + module + note + ("  ..." if again else "")
        if module not in spelled_out:
            spelled_out.add(module)
            for edge in edges.get(module, []):
                yield from branch(edge.target, depth + 1, notes[edge.place])

    targets = {edge.target for edge in found}
    for module in [*(m for m in modules if m not in targets), *modules]:
        if module not in spelled_out:
            yield from branch(module, 0, "")


def main() -> int:
    files = sources()
    found = imports(files)
    print("\n".join(tree(found, list(files))))
    wrong = circles(run_time(found))
    for circle in wrong:
        print("\ncircle:", describe(circle), sep="\n")
    for circle in circles(found):
        if any(edge.place == TYPES for edge in circle):
            print("\nfor type checkers alone, which is allowed:", describe(circle), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
