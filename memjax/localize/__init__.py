"""Localization: which part of an image is stored. Maps of curvature and score, scans, masks."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
