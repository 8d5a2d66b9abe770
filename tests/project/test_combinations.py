"""Does the choice of combinations for `make test` contain every pair, and is it short?"""

from itertools import combinations, product

import pytest

from ..helpers.combinations import covering


def rows_of(*sizes):
    return [dict(enumerate_names(values)) for values in product(*map(range, sizes))]


def enumerate_names(values):
    return ((f"p{index}", value) for index, value in enumerate(values))


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((4, 4), 16), ((4, 4, 4), 20), ((2, 2, 2), 5), ((2, 3, 4, 4), 20), ((3, 2, 2, 2, 2, 2), 10), ((5,), 5)],
    ids=str,
)
def test_every_pair_of_values_is_covered(sizes, most):
    rows = rows_of(*sizes)
    chosen = [rows[index] for index in covering(rows)]
    assert len(chosen) <= most
    for (one, size), (other, more) in combinations(enumerate_names(sizes), 2):
        assert {(row[one], row[other]) for row in chosen} == set(product(range(size), range(more)))
    for name, size in enumerate_names(sizes):
        assert {row[name] for row in chosen} == set(range(size))


def test_only_pairs_that_occur_are_covered():
    rows = [row for row in rows_of(3, 3, 3) if row["p0"] != row["p1"]]
    chosen = [rows[index] for index in covering(rows)]
    assert {(row["p0"], row["p1"]) for row in chosen} == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_same_choice_for_the_same_rows():
    """The processes that share the tests must choose the same ones."""
    rows = rows_of(3, 4, 2, 3)
    assert covering(rows) == covering([dict(reversed(row.items())) for row in rows])
    assert covering(rows) == sorted(set(covering(rows)))


def test_rows_without_parameters():
    assert covering([{}]) == [0]
    assert covering([]) == []
