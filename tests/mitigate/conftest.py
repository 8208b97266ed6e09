"""What several tests of mitigation use."""

import jax
import pytest


class _Counting:
    """A score that counts its evaluations, one per sample, also under vmap and jit."""

    def __init__(self, score):
        self.score, self.calls = score, 0

    def _count(self, _):
        self.calls += 1

    def __call__(self, x, sigma, condition=None):
        jax.debug.callback(self._count, x)
        return self.score(x, sigma, condition)


@pytest.fixture
def counting():
    """Makes a score that counts its evaluations in ``calls``."""
    return _Counting
