"""The value belonged to another gauge than the potentials.

A point with a strict marginal is out of reach, so the value depends on the gauge. An item of few entries that does not converge is
solved from the other side as well; its potentials were shifted to the gauge of x, and its value was not. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu", "reference"]
CASE = Case(
    seed=11325,
    x_lengths=(7, 6, 12, 6),
    y_lengths=(11, 8, 11, 0),
    dim=3,
    cost="given",
    x_type="float64",
    y_type="float16",
    x_layout="packed",
    y_view="gaps",
    padding=3,
    lengths_type="int32",
    points="zeros",
    scale=6.196705769838466,
    bad=nan,
    a="zeros",
    b="random",
    prior="band",
    prior_size=-1.921092210245555,
    reg=2.1644130160799296e-95,
    max_iter=1000,
    tol=0.1,
    functional="image x",
    reduction="sum",
    property="alone",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
