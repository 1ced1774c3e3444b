"""A range as it is written: what it admits, and what a user is told of one that admits nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.ranges import Range, describe


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    low, step, count = (draw(st.integers(*ends)) for ends in ((2, 600), (1, 64), (1, 40)))
    return Range(low, low + step * count, step)


@given(ranges())
def test_a_range_is_read_as_it_is_written(given_range: Range) -> None:
    assert Range.parse(str(given_range)) == given_range
    assert Range.parse(f" {given_range.low} .. {given_range.high} / {given_range.step} ")


@given(ranges(), st.integers(1, 5000))
def test_the_nearest_size_is_on_the_grid_and_no_further_than_half_a_step(
    given_range: Range, size: int
) -> None:
    nearest = given_range.nearest(size)
    assert (nearest - given_range.low) % given_range.step == 0
    assert abs(nearest - size) * 2 <= given_range.step
    if size in given_range:
        assert nearest == size


@given(ranges(), st.floats(0, 1))
def test_every_share_of_the_way_is_a_size_of_the_range(given_range: Range, share: float) -> None:
    assert given_range.between(share) in given_range
    assert (given_range.between(0.0), given_range.between(1.0)) == (
        given_range.low,
        given_range.high,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("512..64", 'the lower end is not below the upper one: "64..512"'),
        ("64..64", "write 64"),
        ("1..64", "a range begins at 2"),
        ("64..512/0", "a step is 1 or more"),
        ("64..512/500", "at most 448"),
        ("64..500/32", '"64..480/32" or "64..512/32"'),
        ("64-512", 'or a range as "64..512" or "64..512/32"'),
        ("64...512", "or a range as"),
        ("-2..5", "or a range as"),
    ],
)
def test_a_range_that_cannot_be_says_what_would_do(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        Range.parse(text)
    assert words in str(error.value)


def test_a_shape_is_said_as_an_example_says_it() -> None:
    assert describe((3, None, None), (None, Range(8, 16), Range(8, 16, 4))) == "[3, 8..16, 8..16/4]"
    assert describe((3, None), ()) == "[3, any]"
