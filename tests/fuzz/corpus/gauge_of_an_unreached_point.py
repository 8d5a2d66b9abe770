"""The reference shifted the potential of a point that no mass can reach.

It has weight zero, and its only allowed pair is with a point that is itself out of reach. (Found by the fuzzer.)"""

from math import inf, nan  # noqa: F401

from tests.fuzz.case import Case

BACKENDS = ["reference", "cpu"]
CASE = Case(
    seed=6980,
    x_lengths=(33, 1, 4, 4),
    y_lengths=(17, 4, 1, 0),
    dim=3,
    cost="given",
    y_type="bfloat16",
    y_layout="packed",
    x_view="gaps",
    y_view="gaps",
    padding=1,
    poison=1e30,
    lengths_type="none",
    forbidden=0.9,
    a="zeros",
    b="zeros",
    prior="quadratic",
    prior_size=0.9755726293920008,
    reg=-3.210353957882024,
    reg_spread=2.0,
    tol=1e-06,
    accelerate=False,
    objective="divergence",
    reduction="sum",
    property="permutation",
)

if __name__ == "__main__":
    from tests.fuzz.replay import replay

    replay(CASE, BACKENDS)
