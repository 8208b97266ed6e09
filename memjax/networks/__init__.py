"""Flax networks that memjax trains itself, and the one convolution they all use."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
