"""Latencies by their quantiles: of the calls that were, and of the recent ones alone."""

from __future__ import annotations

import pytest

from crio_native.cri.counting import Operation


def test_quantiles_are_of_the_calls_that_were() -> None:
    operation = Operation()
    assert operation.quantile(0.5) == 0.0
    for seconds in (3.0, 1.0, 2.0):
        operation.took(seconds, seconds == 2.0)
    assert [operation.quantile(part) for part in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
    assert (operation.calls, operation.errors, operation.seconds, operation.last) == (3, 1, 6.0, 2.0)


@pytest.mark.parametrize("count", [512, 700, 5000])
def test_old_calls_are_forgotten(count: int) -> None:
    operation = Operation()
    for number in range(count):
        operation.took(float(number), False)
    assert (operation.quantile(0.0), operation.quantile(1.0)) == (count - 512, count - 1)
