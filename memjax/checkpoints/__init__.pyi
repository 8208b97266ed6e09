from .classifier import load_classifier as load_classifier
from .classifier import save_classifier as save_classifier
from .export import export_diffusers as export_diffusers
from .files import read_config as read_config
from .files import save as save
from .inspect import Inspection as Inspection
from .inspect import inspect_model as inspect_model
from .loading import load as load
from .prompts import PromptEncoder as PromptEncoder
from .prompts import load_prompts as load_prompts
from .torch_bridge import from_torch as from_torch

__all__ = [
    "Inspection",
    "PromptEncoder",
    "export_diffusers",
    "from_torch",
    "inspect_model",
    "load",
    "load_classifier",
    "load_prompts",
    "read_config",
    "save",
    "save_classifier",
]
