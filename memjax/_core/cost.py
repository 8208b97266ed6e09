"""One unit of cost for the whole library: products with the network."""

from typing import NamedTuple

from jaxtyping import Array, Int

Count = int | Int[Array, ""]
"""A number of products, known in advance or counted by the program."""


class Cost(NamedTuple):
    """Network products used, for one sample.

    Seconds depend on the machine, products do not. As a rule of thumb on CPU, once a network is
    linearised a ``jvp`` costs 0.8 and a ``vjp`` about 1.0 of a forward evaluation.

    Attributes:
        forward: evaluations of the network.
        jvp: Jacobian-vector products J v.
        vjp: transposed products J^T u.
    """

    forward: Count = 0
    jvp: Count = 0
    vjp: Count = 0

    @property
    def total(self) -> Count:
        """All products counted alike."""
        return self.forward + self.jvp + self.vjp

    def plus(self, other: "Cost") -> "Cost":
        """Cost of doing both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, repeats: Count) -> "Cost":
        """Cost of doing this ``repeats`` times."""
        return Cost(*(a * repeats for a in self))
