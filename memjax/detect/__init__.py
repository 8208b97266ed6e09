"""Detectors: is this image memorized? One file a method, one small protocol for all."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
