from .linearize import Linearization as Linearization
from .linearize import linearize as linearize

__all__ = ["Linearization", "linearize"]
