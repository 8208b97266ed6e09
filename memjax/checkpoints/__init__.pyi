from .files import load as load
from .files import read_config as read_config
from .files import save as save

__all__ = ["load", "read_config", "save"]
