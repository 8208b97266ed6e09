from .attractors import Attractors as Attractors
from .attractors import find_attractors as find_attractors
from .fixed_points import FixedPoints as FixedPoints
from .fixed_points import Stability as Stability
from .fixed_points import find_fixed_points as find_fixed_points
from .fixed_points import measure_stability as measure_stability
from .fixed_points import polish as polish

__all__ = [
    "Attractors",
    "FixedPoints",
    "Stability",
    "find_attractors",
    "find_fixed_points",
    "measure_stability",
    "polish",
]
