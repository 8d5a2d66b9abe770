"""The potential of a point of weight 1e-35 was bounded to 40 nats from the next one.

The last sweep absorbs potentials that leave the range of floats. The one before, which is the result, was then kept as a factor, at
most exp(40). (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["cpu"]
CASE = Case(
    seed=4,
    x_lengths=(5, 5, 5),
    y_lengths=(0, 0, 5),
    dim=0,
    cost="given",
    x_type="bfloat16",
    y_type="bfloat16",
    x_layout="packed",
    y_layout="jagged",
    x_view="transposed",
    padding=3,
    poison=inf,
    lengths_type="list",
    offset=100.0,
    forbidden=0.9,
    a="wide",
    b="wide",
    prior_size=0.9413343250913653,
    reg=-1.3955520651596909,
    reg_spread=0.5,
    rho_x=2.684686503762304,
    max_iter=1000,
    objective="transport",
    reduction="mean",
    property="permutation",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
