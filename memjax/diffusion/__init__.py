"""Schedules, predictions, combined scores and models: everything that knows how noise was added."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
