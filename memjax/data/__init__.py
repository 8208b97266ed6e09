"""Images from a folder, an array file or the bundled digits; test beds with known truth."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
