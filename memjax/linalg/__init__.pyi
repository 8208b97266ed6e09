from .arnoldi import ComplexEigenpairs as ComplexEigenpairs
from .arnoldi import eigs as eigs
from .estimate import Estimate as Estimate
from .exact import diagonal_exact as diagonal_exact
from .exact import trace_exact as trace_exact
from .lanczos import Eigenpairs as Eigenpairs
from .lanczos import eigsh as eigsh
from .probes import gaussian as gaussian
from .probes import orthonormal as orthonormal
from .probes import rademacher as rademacher
from .probes import sphere as sphere
from .quadrature import SpectralDensity as SpectralDensity
from .quadrature import spectral_density as spectral_density

__all__ = [
    "ComplexEigenpairs",
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "diagonal_exact",
    "eigs",
    "eigsh",
    "gaussian",
    "orthonormal",
    "rademacher",
    "spectral_density",
    "sphere",
    "trace_exact",
]
