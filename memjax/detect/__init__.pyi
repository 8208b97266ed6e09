from .denoising_loss import DenoisingLoss as DenoisingLoss
from .evaluate import evaluate_detectors as evaluate_detectors
from .local_dimension import FLIPD as FLIPD
from .local_dimension import EffectiveDimension as EffectiveDimension
from .protocol import Detector as Detector
from .protocol import Evaluation as Evaluation
from .protocol import Finding as Finding
from .protocol import Need as Need
from .protocol import Point as Point
from .protocol import Product as Product
from .protocol import Trace as Trace
from .protocol import cost as cost
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
