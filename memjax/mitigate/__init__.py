"""Mitigation: change the initial noise, the prompt, or the training set; nothing else."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
