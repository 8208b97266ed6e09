"""Numbers about scores and images, from plain arrays: rates, intervals, flags, copies."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
