from . import auditing as auditing
from . import calculus as calculus
from . import checkpoints as checkpoints
from . import data as data
from . import densities as densities
from . import detect as detect
from . import diffusion as diffusion
from . import evaluate as evaluate
from . import linalg as linalg
from . import networks as networks
from . import report as report
from . import training as training
from ._core.backend import check_backend as check_backend
from ._core.cost import Cost as Cost
from ._core.status import Status as Status
from .auditing.plan import Calibration as Calibration
from .auditing.result import AuditResult as AuditResult
from .auditing.run import audit as audit
from .calculus.linearization import Linearization as Linearization
from .calculus.linearization import linearize as linearize
from .checkpoints.files import load as load
from .checkpoints.files import save as save
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
from .diffusion.model import Model as Model
from .diffusion.prediction import from_prediction as from_prediction
from .diffusion.sampling import sample as sample
from .linalg.exact import diagonal_exact as diagonal_exact
from .linalg.exact import trace_exact as trace_exact
from .report.build import build_report as build_report
from .training.loop import train as train

__version__: str

__all__ = [
    "AuditResult",
    "Calibration",
    "ConditionalMixture",
    "Cost",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "ImageSet",
    "Linearization",
    "LinenNetwork",
    "Model",
    "NNXNetwork",
    "Status",
    "at",
    "audit",
    "auditing",
    "build_report",
    "calculus",
    "check_backend",
    "check_score",
    "checkpoints",
    "classifier_guided",
    "data",
    "densities",
    "detect",
    "diagonal_exact",
    "difference",
    "diffusion",
    "evaluate",
    "from_prediction",
    "gap",
    "guided",
    "linalg",
    "linearize",
    "load",
    "load_images",
    "networks",
    "report",
    "sample",
    "save",
    "trace_exact",
    "train",
    "training",
]
