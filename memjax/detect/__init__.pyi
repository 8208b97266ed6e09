from .denoising_loss import DenoisingLoss as DenoisingLoss
from .evaluate import evaluate_detectors as evaluate_detectors
from .local_dimension import FLIPD as FLIPD
from .local_dimension import EffectiveDimension as EffectiveDimension
from .local_dimension import FluxDimension as FluxDimension
from .p_laplace import PLaplace as PLaplace
from .p_laplace import PLaplaceFlux as PLaplaceFlux
from .p_laplace import PublishedPLaplaceFlux as PublishedPLaplaceFlux
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
from .sample_distance import DistanceRatio as DistanceRatio
from .sample_distance import NearestSample as NearestSample
from .sample_distance import NormalizedL2 as NormalizedL2
from .sample_distance import SampleDetector as SampleDetector
from .sample_distance import TiledL2 as TiledL2
from .score_norm import ScoreNorm as ScoreNorm

__all__ = [
    "FLIPD",
    "DenoisingLoss",
    "Detector",
    "DistanceRatio",
    "EffectiveDimension",
    "Evaluation",
    "Finding",
    "FluxDimension",
    "NearestSample",
    "Need",
    "NormalizedL2",
    "PLaplace",
    "PLaplaceFlux",
    "Point",
    "Product",
    "PublishedPLaplaceFlux",
    "SampleDetector",
    "ScoreNorm",
    "TiledL2",
    "Trace",
    "cost",
    "evaluate_detectors",
    "finding",
]
