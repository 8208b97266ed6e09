from .differential import asymmetry as asymmetry
from .differential import asymmetry_exact as asymmetry_exact
from .differential import curl as curl
from .differential import divergence as divergence
from .differential import hessian as hessian
from .differential import laplacian as laplacian
from .flux import FluxEstimate as FluxEstimate
from .flux import p_laplacian_ball as p_laplacian_ball
from .flux import p_laplacian_flux as p_laplacian_flux
from .flux import p_laplacian_stein as p_laplacian_stein
from .linearization import Linearization as Linearization
from .linearization import linearize as linearize
from .p_laplace import PLaplacianInfo as PLaplacianInfo
from .p_laplace import level_set_curvature as level_set_curvature
from .p_laplace import p_laplacian as p_laplacian
from .p_laplace import p_laplacian_of as p_laplacian_of
from .stencil import StencilEstimate as StencilEstimate
from .stencil import divergence_stencil as divergence_stencil
from .stencil import p_laplacian_stencil as p_laplacian_stencil

__all__ = [
    "FluxEstimate",
    "Linearization",
    "PLaplacianInfo",
    "StencilEstimate",
    "asymmetry",
    "asymmetry_exact",
    "curl",
    "divergence",
    "divergence_stencil",
    "hessian",
    "laplacian",
    "level_set_curvature",
    "linearize",
    "p_laplacian",
    "p_laplacian_ball",
    "p_laplacian_flux",
    "p_laplacian_of",
    "p_laplacian_stein",
    "p_laplacian_stencil",
]
