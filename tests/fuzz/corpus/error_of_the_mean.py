"""The error was that of one order of updates, and the potentials were the mean of both.

An item that equals its transposed one and does not converge gets the mean of both orders. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu"]
CASE = Case(
    seed=3894,
    x_lengths=(5, 5, 2),
    y_lengths=(33, 33, 1),
    dim=1,
    cost="cosine",
    x_type="float64",
    y_type="float64",
    x_layout="packed",
    y_layout="packed",
    y_view="repeated",
    poison=0.0,
    lengths_type="int32",
    points="collinear",
    a="zeros",
    b="zeros",
    prior="absolute",
    reg_spread=2.0,
    rho_x=0.0,
    rho_y=0.0,
    max_iter=1,
    tol=1e-10,
    functional="all",
    objective="divergence",
    property="scale",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
