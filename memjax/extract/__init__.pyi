from .attractors import Attractors as Attractors
from .attractors import find_attractors as find_attractors
from .attractors import rank_attractors as rank_attractors
from .candidates import Candidates as Candidates
from .candidates import rank_by_density as rank_by_density
from .divergence import DivergenceDifference as DivergenceDifference
from .divergence import divergence_difference as divergence_difference
from .fixed_points import FixedPoints as FixedPoints
from .fixed_points import Stability as Stability
from .fixed_points import find_fixed_points as find_fixed_points
from .fixed_points import measure_stability as measure_stability
from .fixed_points import polish as polish
from .guidance import GuidedSamples as GuidedSamples
from .guidance import guided_samples as guided_samples
from .surrogate import SurrogateLabels as SurrogateLabels
from .surrogate import assign_labels as assign_labels
from .surrogate import posterior_classifier as posterior_classifier
from .surrogate import surrogate_labels as surrogate_labels

__all__ = [
    "Attractors",
    "Candidates",
    "DivergenceDifference",
    "FixedPoints",
    "GuidedSamples",
    "Stability",
    "SurrogateLabels",
    "assign_labels",
    "divergence_difference",
    "find_attractors",
    "find_fixed_points",
    "guided_samples",
    "measure_stability",
    "polish",
    "posterior_classifier",
    "rank_attractors",
    "rank_by_density",
    "surrogate_labels",
]
