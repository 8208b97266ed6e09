from .estimate import Estimate as Estimate
from .exact import diagonal_exact as diagonal_exact
from .exact import trace_exact as trace_exact

__all__ = ["Estimate", "diagonal_exact", "trace_exact"]
