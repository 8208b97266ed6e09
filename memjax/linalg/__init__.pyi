from .arnoldi import ComplexEigenpairs as ComplexEigenpairs
from .arnoldi import eigs as eigs
from .choice import DiagonalChoice as DiagonalChoice
from .choice import DiagonalMethod as DiagonalMethod
from .choice import diagonal_auto as diagonal_auto
from .diagonal import diagonal_hutchinson as diagonal_hutchinson
from .diagonal import diagonal_xdiag as diagonal_xdiag
from .diagonal import diagonal_xnysdiag as diagonal_xnysdiag
from .estimate import Estimate as Estimate
from .exact import diagonal_exact as diagonal_exact
from .exact import trace_exact as trace_exact
from .lanczos import Eigenpairs as Eigenpairs
from .lanczos import eigsh as eigsh
from .lattice import diagonal_lattice as diagonal_lattice
from .lattice import lattice_probes as lattice_probes
from .probes import gaussian as gaussian
from .probes import orthonormal as orthonormal
from .probes import rademacher as rademacher
from .probes import sphere as sphere
from .quadrature import SpectralDensity as SpectralDensity
from .quadrature import spectral_density as spectral_density
from .trace import trace_hutchinson as trace_hutchinson
from .trace import trace_hutchpp as trace_hutchpp
from .trace import trace_xnystrace as trace_xnystrace
from .trace import trace_xtrace as trace_xtrace

__all__ = [
    "ComplexEigenpairs",
    "DiagonalChoice",
    "DiagonalMethod",
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "diagonal_auto",
    "diagonal_exact",
    "diagonal_hutchinson",
    "diagonal_lattice",
    "diagonal_xdiag",
    "diagonal_xnysdiag",
    "eigs",
    "eigsh",
    "gaussian",
    "lattice_probes",
    "orthonormal",
    "rademacher",
    "spectral_density",
    "sphere",
    "trace_exact",
    "trace_hutchinson",
    "trace_hutchpp",
    "trace_xnystrace",
    "trace_xtrace",
]
