"""The transport cost left out an entry of the plan whose density was above 1e30.

A point of weight 1e-60 in float64 has such a density before its row converges. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu"]
CASE = Case(
    seed=434,
    x_lengths=(5, 5, 8, 33),
    y_lengths=(6, 6, 17, 17),
    dim=17,
    cost="cosine",
    x_type="float64",
    x_view="sliced",
    y_view="transposed",
    lengths_type="int32",
    points="zeros",
    offset=1.0,
    forbidden=0.3,
    a="wide",
    b="norm",
    prior="absolute",
    prior_size=-0.413776958516785,
    reg=-2.919345164016331,
    reg_spread=2.0,
    rho_items=True,
    max_iter=20,
    tol=1e-10,
    start="potentials",
    objective="divergence",
    property="permutation",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
