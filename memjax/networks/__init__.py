"""Networks: those memjax trains itself, those of published checkpoints, and their convolution."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
