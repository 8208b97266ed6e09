"""Figures and the self-contained HTML page, built from a finished audit's files."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
