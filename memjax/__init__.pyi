from . import auditing as auditing
from . import calculus as calculus
from . import checkpoints as checkpoints
from . import data as data
from . import densities as densities
from . import detect as detect
from . import diffusion as diffusion
from . import evaluate as evaluate
from . import extract as extract
from . import linalg as linalg
from . import localize as localize
from . import mitigate as mitigate
from . import networks as networks
from . import report as report
from . import training as training
from ._core.backend import check_backend as check_backend
from ._core.cost import Cost as Cost
from ._core.status import Status as Status
from .auditing.plan import Calibration as Calibration
from .auditing.result import AuditResult as AuditResult
from .auditing.run import audit as audit
from .calculus.differential import asymmetry as asymmetry
from .calculus.differential import asymmetry_exact as asymmetry_exact
from .calculus.differential import curl as curl
from .calculus.differential import divergence as divergence
from .calculus.differential import hessian as hessian
from .calculus.differential import laplacian as laplacian
from .calculus.flux import p_laplacian_ball as p_laplacian_ball
from .calculus.flux import p_laplacian_flux as p_laplacian_flux
from .calculus.flux import p_laplacian_stein as p_laplacian_stein
from .calculus.linearization import Linearization as Linearization
from .calculus.linearization import linearize as linearize
from .calculus.p_laplace import level_set_curvature as level_set_curvature
from .calculus.p_laplace import p_laplacian as p_laplacian
from .calculus.p_laplace import p_laplacian_of as p_laplacian_of
from .calculus.stencil import divergence_stencil as divergence_stencil
from .calculus.stencil import p_laplacian_stencil as p_laplacian_stencil
from .checkpoints.files import save as save
from .checkpoints.loading import load as load
from .checkpoints.torch_bridge import from_torch as from_torch
from .data.images import ImageSet as ImageSet
from .data.images import load_images as load_images
from .densities.conditional import ConditionalMixture as ConditionalMixture
from .densities.empirical import Empirical as Empirical
from .densities.gaussian import Gaussian as Gaussian
from .densities.mixture import GaussianMixture as GaussianMixture
from .diffusion.adapters import LinenNetwork as LinenNetwork
from .diffusion.adapters import NNXNetwork as NNXNetwork
from .diffusion.combine import at as at
from .diffusion.combine import classifier_guided as classifier_guided
from .diffusion.combine import difference as difference
from .diffusion.combine import gap as gap
from .diffusion.combine import guided as guided
from .diffusion.conformance import check_score as check_score
from .diffusion.flow import probability_flow as probability_flow
from .diffusion.likelihood import bits_per_dim as bits_per_dim
from .diffusion.likelihood import log_likelihood as log_likelihood
from .diffusion.likelihood import log_likelihood_ratio as log_likelihood_ratio
from .diffusion.model import Model as Model
from .diffusion.model import from_callable as from_callable
from .diffusion.prediction import from_prediction as from_prediction
from .diffusion.sampling import sample as sample
from .diffusion.volume import volume_growth as volume_growth
from .diffusion.volume import volume_growth_frame as volume_growth_frame
from .diffusion.volume import volume_growth_top as volume_growth_top
from .linalg.arnoldi import eigs as eigs
from .linalg.choice import diagonal_auto as diagonal_auto
from .linalg.diagonal import diagonal_hutchinson as diagonal_hutchinson
from .linalg.diagonal import diagonal_xdiag as diagonal_xdiag
from .linalg.diagonal import diagonal_xnysdiag as diagonal_xnysdiag
from .linalg.estimate import Estimate as Estimate
from .linalg.exact import diagonal_exact as diagonal_exact
from .linalg.exact import trace_exact as trace_exact
from .linalg.lanczos import eigsh as eigsh
from .linalg.lattice import diagonal_lattice as diagonal_lattice
from .linalg.quadrature import spectral_density as spectral_density
from .linalg.trace import trace_hutchinson as trace_hutchinson
from .linalg.trace import trace_hutchpp as trace_hutchpp
from .linalg.trace import trace_xnystrace as trace_xnystrace
from .linalg.trace import trace_xtrace as trace_xtrace
from .report.build import build_report as build_report
from .training.loop import train as train

__version__: str

__all__ = [
    "AuditResult",
    "Calibration",
    "ConditionalMixture",
    "Cost",
    "Empirical",
    "Estimate",
    "Gaussian",
    "GaussianMixture",
    "ImageSet",
    "Linearization",
    "LinenNetwork",
    "Model",
    "NNXNetwork",
    "Status",
    "asymmetry",
    "asymmetry_exact",
    "at",
    "audit",
    "auditing",
    "bits_per_dim",
    "build_report",
    "calculus",
    "check_backend",
    "check_score",
    "checkpoints",
    "classifier_guided",
    "curl",
    "data",
    "densities",
    "detect",
    "diagonal_auto",
    "diagonal_exact",
    "diagonal_hutchinson",
    "diagonal_lattice",
    "diagonal_xdiag",
    "diagonal_xnysdiag",
    "difference",
    "diffusion",
    "divergence",
    "divergence_stencil",
    "eigs",
    "eigsh",
    "evaluate",
    "extract",
    "from_callable",
    "from_prediction",
    "from_torch",
    "gap",
    "guided",
    "hessian",
    "laplacian",
    "level_set_curvature",
    "linalg",
    "linearize",
    "load",
    "load_images",
    "localize",
    "log_likelihood",
    "log_likelihood_ratio",
    "mitigate",
    "networks",
    "p_laplacian",
    "p_laplacian_ball",
    "p_laplacian_flux",
    "p_laplacian_of",
    "p_laplacian_stein",
    "p_laplacian_stencil",
    "probability_flow",
    "report",
    "sample",
    "save",
    "spectral_density",
    "trace_exact",
    "trace_hutchinson",
    "trace_hutchpp",
    "trace_xnystrace",
    "trace_xtrace",
    "train",
    "training",
    "volume_growth",
    "volume_growth_frame",
    "volume_growth_top",
]
