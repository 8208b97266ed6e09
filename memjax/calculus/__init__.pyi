from .linearization import Linearization as Linearization
from .linearization import linearize as linearize

__all__ = ["Linearization", "linearize"]
