from .combined import Difference as Difference
from .combined import FluxAndLoss as FluxAndLoss
from .denoising_loss import DenoisingLoss as DenoisingLoss
from .difficulty import OverDifficulty as OverDifficulty
from .evaluate import evaluate_detectors as evaluate_detectors
from .local_dimension import FLIPD as FLIPD
from .local_dimension import DimensionProfile as DimensionProfile
from .local_dimension import Dimensions as Dimensions
from .local_dimension import EffectiveDimension as EffectiveDimension
from .local_dimension import FluxDimension as FluxDimension
from .local_dimension import dimension_profile as dimension_profile
from .multiplicity import MultiplicityEstimate as MultiplicityEstimate
from .multiplicity import estimate_multiplicity as estimate_multiplicity
from .neighbors import Blurred as Blurred
from .p_laplace import PLaplace as PLaplace
from .p_laplace import PLaplaceFlux as PLaplaceFlux
from .p_laplace import PublishedPLaplaceFlux as PublishedPLaplaceFlux
from .plan import Requirements as Requirements
from .plan import cost as cost
from .plan import requirements as requirements
from .products import AlongGap as AlongGap
from .products import AlongScore as AlongScore
from .products import ExtremeEigenvalues as ExtremeEigenvalues
from .products import Jacobian as Jacobian
from .products import SpectralQuadrature as SpectralQuadrature
from .products import Spectrum as Spectrum
from .products import Trace as Trace
from .protocol import Branch as Branch
from .protocol import Detector as Detector
from .protocol import Evaluation as Evaluation
from .protocol import Finding as Finding
from .protocol import Local as Local
from .protocol import Need as Need
from .protocol import Neighbor as Neighbor
from .protocol import Point as Point
from .protocol import Product as Product
from .protocol import Trajectory as Trajectory
from .protocol import finding as finding
from .sample_distance import DistanceRatio as DistanceRatio
from .sample_distance import NearestSample as NearestSample
from .sample_distance import NormalizedL2 as NormalizedL2
from .sample_distance import SampleDetector as SampleDetector
from .sample_distance import SampleFinding as SampleFinding
from .sample_distance import TiledL2 as TiledL2
from .score_gap import Anisotropy as Anisotropy
from .score_gap import DenoisedNorm as DenoisedNorm
from .score_gap import GapSharpness as GapSharpness
from .score_gap import ScoreGap as ScoreGap
from .score_norm import ScoreNorm as ScoreNorm
from .sharpness import BelowFloor as BelowFloor
from .sharpness import ExtremeEigenvalue as ExtremeEigenvalue
from .sharpness import FloorShare as FloorShare
from .sharpness import NegativeShare as NegativeShare
from .sharpness import Sharpness as Sharpness
from .sharpness import SharpnessProxy as SharpnessProxy
from .sphere_loss import SphereLoss as SphereLoss
from .volume_growth import NormalizedVolumeGrowth as NormalizedVolumeGrowth

__all__ = [
    "FLIPD",
    "Anisotropy",
    "BelowFloor",
    "Blurred",
    "DenoisedNorm",
    "DenoisingLoss",
    "Detector",
    "Difference",
    "DimensionProfile",
    "DistanceRatio",
    "EffectiveDimension",
    "Evaluation",
    "ExtremeEigenvalue",
    "Finding",
    "FloorShare",
    "FluxAndLoss",
    "FluxDimension",
    "GapSharpness",
    "MultiplicityEstimate",
    "NearestSample",
    "Need",
    "NegativeShare",
    "Neighbor",
    "NormalizedL2",
    "NormalizedVolumeGrowth",
    "OverDifficulty",
    "PLaplace",
    "PLaplaceFlux",
    "Point",
    "Product",
    "PublishedPLaplaceFlux",
    "SampleDetector",
    "ScoreGap",
    "ScoreNorm",
    "Sharpness",
    "SharpnessProxy",
    "SphereLoss",
    "TiledL2",
    "Trace",
    "cost",
    "dimension_profile",
    "estimate_multiplicity",
    "evaluate_detectors",
    "finding",
]
