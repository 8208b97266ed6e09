"""One unit of cost for the whole library: products with the network."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Network products used, for one sample.

    Seconds depend on the machine, products do not. As a rule of thumb on CPU, once a network is
    linearised a ``jvp`` costs 0.8 and a ``vjp`` about 1.0 of a forward evaluation.

    Attributes:
        forward: evaluations of the network.
        jvp: Jacobian-vector products J v.
        vjp: transposed products J^T u.
    """

    forward: int = 0
    jvp: int = 0
    vjp: int = 0

    @property
    def total(self) -> int:
        """All products counted alike."""
        return self.forward + self.jvp + self.vjp

    def plus(self, other: "Cost") -> "Cost":
        """Cost of doing both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, repeats: int) -> "Cost":
        """Cost of doing this ``repeats`` times."""
        return Cost(*(a * repeats for a in self))
