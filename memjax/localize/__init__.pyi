from .maps import Maps as Maps
from .maps import PixelMap as PixelMap
from .maps import curvature_maps as curvature_maps
from .maps import maps_cost as maps_cost
from .maps import mean_over_draws as mean_over_draws
from .maps import over_others as over_others
from .masks import PublishedOverlap as PublishedOverlap
from .masks import fit_threshold as fit_threshold
from .masks import published_overlap as published_overlap
from .masks import smooth as smooth
from .points import noised_points as noised_points
from .points import trajectory_points as trajectory_points
from .scan import Scan as Scan
from .scan import scan_images as scan_images
from .scan import scan_levels as scan_levels
from .scan import scan_points as scan_points
from .scan import scan_samples as scan_samples

__all__ = [
    "Maps",
    "PixelMap",
    "PublishedOverlap",
    "Scan",
    "curvature_maps",
    "fit_threshold",
    "maps_cost",
    "mean_over_draws",
    "noised_points",
    "over_others",
    "published_overlap",
    "scan_images",
    "scan_levels",
    "scan_points",
    "scan_samples",
    "smooth",
    "trajectory_points",
]
