from .denoising_loss import DenoisingLoss as DenoisingLoss
from .evaluate import evaluate_detectors as evaluate_detectors
from .local_dimension import FLIPD as FLIPD
from .local_dimension import EffectiveDimension as EffectiveDimension
from .plan import Requirements as Requirements
from .plan import cost as cost
from .plan import requirements as requirements
from .products import AlongGap as AlongGap
from .products import AlongScore as AlongScore
from .products import Jacobian as Jacobian
from .products import Trace as Trace
from .protocol import Branch as Branch
from .protocol import Detector as Detector
from .protocol import Evaluation as Evaluation
from .protocol import Finding as Finding
from .protocol import Local as Local
from .protocol import Need as Need
from .protocol import Point as Point
from .protocol import Product as Product
from .protocol import Trajectory as Trajectory
from .protocol import finding as finding
from .score_norm import ScoreNorm as ScoreNorm

__all__ = [
    "FLIPD",
    "DenoisingLoss",
    "Detector",
    "EffectiveDimension",
    "Evaluation",
    "Finding",
    "Need",
    "Point",
    "Product",
    "ScoreNorm",
    "Trace",
    "cost",
    "evaluate_detectors",
    "finding",
]
