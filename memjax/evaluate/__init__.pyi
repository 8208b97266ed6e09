from .conformal import FlagResult as FlagResult
from .conformal import benjamini_hochberg as benjamini_hochberg
from .conformal import conformal_p_values as conformal_p_values
from .conformal import flag as flag
from .distances import CopyResult as CopyResult
from .distances import Neighbors as Neighbors
from .distances import find_copies as find_copies
from .distances import group_identical as group_identical
from .distances import nearest_neighbors as nearest_neighbors

__all__ = [
    "CopyResult",
    "FlagResult",
    "Neighbors",
    "benjamini_hochberg",
    "conformal_p_values",
    "find_copies",
    "flag",
    "group_identical",
    "nearest_neighbors",
]
