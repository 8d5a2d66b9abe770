"""The adjoint of a plan of two parts followed the rounding of its residual, to ten times the size that it may have.

Parts that hardly touch leave conjugate gradients a direction without curvature. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu"]
CASE = Case(
    seed=1048575,
    x_lengths=(2,),
    y_lengths=(11,),
    cost="dot",
    y_type="float64",
    x_layout="jagged",
    y_layout="jagged",
    x_view="repeated",
    y_view="gaps",
    padding=2,
    poison=inf,
    lengths_type="int32",
    offset=100.0,
    forbidden=0.3,
    a="wide",
    prior="band",
    prior_size=-0.5429271844191061,
    reg=-0.5429271844191061,
    max_iter=20,
    accelerate=False,
    functional="plan",
    objective="transport",
    property="scale",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
