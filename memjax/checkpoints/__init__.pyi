from .files import read_config as read_config
from .files import save as save
from .loading import load as load
from .prompts import PromptEncoder as PromptEncoder
from .prompts import load_prompts as load_prompts

__all__ = ["PromptEncoder", "load", "load_prompts", "read_config", "save"]
