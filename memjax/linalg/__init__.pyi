from .estimate import Estimate as Estimate
from .exact import diagonal_exact as diagonal_exact
from .exact import trace_exact as trace_exact
from .probes import gaussian as gaussian
from .probes import orthonormal as orthonormal
from .probes import rademacher as rademacher
from .probes import sphere as sphere

__all__ = [
    "Estimate",
    "diagonal_exact",
    "gaussian",
    "orthonormal",
    "rademacher",
    "sphere",
    "trace_exact",
]
