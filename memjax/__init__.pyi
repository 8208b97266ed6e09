from .calculus.linearize import Linearization as Linearization
from .calculus.linearize import linearize as linearize
from .linalg.exact import diagonal_exact as diagonal_exact
from .linalg.exact import trace_exact as trace_exact

__version__: str

__all__ = ["Linearization", "diagonal_exact", "linearize", "trace_exact"]
