"""Is the engine right beside other libraries with threads, imported in any order?

NumPy, SciPy, scikit-learn and POT bring copies of OpenBLAS and of OpenMP of their own.
"""

import json
import sys

import pytest

from ..helpers.processes import run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names the file of a function as glibc does")

MODULES = ("sklearn", "scipy", "ot", "numpy", "torch", "otalign")
FORWARD = [MODULES[k:] + MODULES[:k] for k in range(len(MODULES))]
ORDERS = FORWARD + [order[::-1] for order in FORWARD]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_import_order(order):
    found = json.loads(run_program("import_orders", *order))
    print(found)
    assert found["worst"] < 1
    assert found["same"], "the bits do not change when the others compute"
    assert found["openmp"] == found["openmp of torch"], "torch and the engine share their threads"
    assert "/torch" in found["blas file"], "the engine uses the BLAS of torch, not that of SciPy"
    if "libraries" in found:
        assert sum("openblas" in library for library in found["libraries"]) >= 2, "there was a choice"
