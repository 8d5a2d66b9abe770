"""The gradient by a weight of 1e-35 had six digits in float64.

Conjugate gradients end by the error of all columns together, of which a column of little mass has little. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu"]
CASE = Case(
    seed=398068,
    x_lengths=(7, 7, 7),
    y_lengths=(2, 2, 2),
    dim=5,
    x_type="float16",
    y_type="float64",
    y_layout="jagged",
    x_view="gaps",
    y_view="gaps",
    padding=2,
    poison=1e30,
    lengths_type="list",
    points="one extreme",
    bad=nan,
    a="norm",
    b="wide",
    reg=1e-06,
    reg_spread=0.5,
    rho_x=2.3137323405059247,
    rho_y=2.3137323405059247,
    rho_items=True,
    max_iter=20,
    tol=1e-10,
    accelerate=False,
    functional="image x",
    objective="transport",
    reduction="mean",
    property="scale",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
