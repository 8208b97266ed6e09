"""Cost arithmetic."""

from memjax._core.cost import Cost


def test_sums_and_multiples():
    a, b = Cost(forward=1, jvp=2), Cost(jvp=3, vjp=4)
    assert a.plus(b) == b.plus(a) == Cost(forward=1, jvp=5, vjp=4)
    assert a.plus(Cost()) == a
    assert a.times(3) == a.plus(a).plus(a) == Cost(forward=3, jvp=6, vjp=0)
    assert a.times(0) == Cost()
    assert a.plus(b).total == a.total + b.total == 10
