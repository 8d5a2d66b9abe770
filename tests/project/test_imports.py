"""Do the package's imports lead one way, without a circle? Those inside functions count as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..helpers import import_circles

# Each imports the next, directly or through others.
ORDER = [f"otalign.backends.{name}" for name in ("cuda", "triton", "cuda_launch", "extension")]


def test_no_import_goes_in_circles():
    found = import_circles.run_time(import_circles.imports(import_circles.sources()))
    assert len(found) > 50, "the modules are read"
    wrong = [import_circles.describe(circle) for circle in import_circles.circles(found)]
    assert not wrong, "imports that go in circles:\n" + "\n\n".join(wrong)


def test_backends_import_each_other_in_one_order():
    files = import_circles.sources()
    missing = [module for module in ORDER if module not in files]
    assert not missing, f"the order of the backends cannot be checked: there is no module {', '.join(missing)}"
    edges = import_circles.graph(import_circles.run_time(import_circles.imports(files)))
    for place, module in enumerate(ORDER):
        for later in ORDER[place + 1 :]:
            assert import_circles.path(edges, module, later) is not None, f"{module} does not import {later}"
            back = import_circles.path(edges, later, module)
            assert back is None, f"{later} imports {module}, which comes before it:\n{import_circles.describe(back)}"


def circles_of(folder: Path, modules: dict[str, str]) -> list[set[str]]:
    """The circles in a package `p` whose files are `modules`, as sets of modules."""
    for name, source in {"__init__.py": "", **modules}.items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = import_circles.imports(import_circles.sources({"p": folder / "p"}))
    return [{edge.module for edge in circle} for circle in import_circles.circles(import_circles.run_time(found))]


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p.a import x",
        "from . import a",
        "from .a import x",
        "def f():\n    from .a import x",
        "f = lambda: importlib.import_module('.a', __package__)",
        "def f():\n    return import_module('p.a')",
        "try:\n    from . import a\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from . import a",
    ],
)
def test_a_circle_is_found(tmp_path, back):
    assert circles_of(tmp_path, {"a.py": "from . import b", "b.py": back}) == [{"p.a", "p.b"}]


def test_a_long_circle_is_found_once(tmp_path):
    modules = {"a.py": "from . import b", "b.py": "from .c import x", "c.py": "from . import d"}
    modules |= {"d.py": "import p.a, p.e", "e.py": ""}
    assert circles_of(tmp_path, modules) == [{"p.a", "p.b", "p.c", "p.d"}]


def test_a_module_imported_through_its_package_is_not_the_package(tmp_path):
    """A package may import its modules while these import each other through it; names of the package itself are its own."""
    modules = {"__init__.py": "from . import a, b", "a.py": "from . import b", "b.py": ""}
    assert circles_of(tmp_path / "modules", modules) == []
    modules = {"__init__.py": "from . import a\nx = 1", "a.py": "from . import x"}
    assert circles_of(tmp_path / "names", modules) == [{"p", "p.a"}]


def test_imports_for_type_checkers_make_no_circle(tmp_path):
    for test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        modules = {"a.py": "from . import b", "b.py": f"if {test}:\n    from .a import x"}
        assert circles_of(tmp_path, modules) == []


def test_packages_inside_the_package(tmp_path):
    modules = {
        "q/__init__.py": "from .r import x",
        "q/r.py": "from ..s import x",
        "s.py": "def f():\n    from .q import r",
    }
    assert circles_of(tmp_path, modules) == [{"p.q.r", "p.s"}]


def test_a_compiled_module_is_not_its_package(tmp_path):
    modules = {"__init__.py": "from . import a", "a.py": "importlib.import_module('p._C')", "_C.pyi": ""}
    assert circles_of(tmp_path, modules) == []
