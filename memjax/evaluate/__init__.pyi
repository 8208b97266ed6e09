from .calibration import calibration_error as calibration_error
from .calibration import fit_temperature as fit_temperature
from .conformal import FlagResult as FlagResult
from .conformal import benjamini_hochberg as benjamini_hochberg
from .conformal import conformal_p_values as conformal_p_values
from .conformal import flag as flag
from .difficulty import excess_over_difficulty as excess_over_difficulty
from .difficulty import image_difficulty as image_difficulty
from .distances import CopyResult as CopyResult
from .distances import Neighbors as Neighbors
from .distances import copy_ratios as copy_ratios
from .distances import find_copies as find_copies
from .distances import group_duplicates as group_duplicates
from .distances import nearest_by_tile as nearest_by_tile
from .distances import nearest_neighbors as nearest_neighbors
from .extraction import BandScores as BandScores
from .extraction import IntervalEstimate as IntervalEstimate
from .extraction import Rarefaction as Rarefaction
from .extraction import extraction_scores as extraction_scores
from .extraction import rarefaction as rarefaction
from .intervals import proportion_interval as proportion_interval
from .overlap import MapRanking as MapRanking
from .overlap import MaskOverlap as MaskOverlap
from .overlap import OverlapEstimate as OverlapEstimate
from .overlap import map_ranking as map_ranking
from .overlap import mask_accuracy as mask_accuracy
from .overlap import mask_iou as mask_iou
from .overlap import mask_overlap as mask_overlap
from .overlap import mean_iou as mean_iou
from .roc import RateEstimate as RateEstimate
from .roc import RocCurve as RocCurve
from .roc import ScoreEstimate as ScoreEstimate
from .roc import auroc as auroc
from .roc import average_precision as average_precision
from .roc import roc_curve as roc_curve
from .roc import tpr_at_fpr as tpr_at_fpr
from .similarity import adaptive_distance_blocks as adaptive_distance_blocks
from .similarity import cosine_blocks as cosine_blocks
from .similarity import distance_blocks as distance_blocks

__all__ = [
    "BandScores",
    "CopyResult",
    "FlagResult",
    "IntervalEstimate",
    "MapRanking",
    "MaskOverlap",
    "Neighbors",
    "OverlapEstimate",
    "Rarefaction",
    "RateEstimate",
    "RocCurve",
    "ScoreEstimate",
    "adaptive_distance_blocks",
    "auroc",
    "average_precision",
    "benjamini_hochberg",
    "calibration_error",
    "conformal_p_values",
    "copy_ratios",
    "cosine_blocks",
    "distance_blocks",
    "excess_over_difficulty",
    "extraction_scores",
    "find_copies",
    "fit_temperature",
    "flag",
    "group_duplicates",
    "image_difficulty",
    "map_ranking",
    "mask_accuracy",
    "mask_iou",
    "mask_overlap",
    "mean_iou",
    "nearest_by_tile",
    "nearest_neighbors",
    "proportion_interval",
    "rarefaction",
    "roc_curve",
    "tpr_at_fpr",
]
