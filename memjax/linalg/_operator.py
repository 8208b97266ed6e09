"""What a linear operator is here: a function of arrays of one shape; and its checks."""

from collections.abc import Callable

from jaxtyping import Array, Float

from memjax._core.checks import check_floating, check_maps_alike
from memjax._core.errors import InputError

Matvec = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def check_like(like: Array) -> None:
    """Refuse an example array that is empty or not floating point."""
    check_floating("like", like)
    if like.size == 0:
        raise InputError(f"like: expected at least one entry, got shape {list(like.shape)}")


def check_matvec(matvec: Matvec, like: Array, name: str = "matvec") -> None:
    """Refuse an operator whose product differs from its argument in shape or dtype."""
    check_like(like)
    check_maps_alike(name, "A v like v", matvec, like)
