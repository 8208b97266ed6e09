from .bundled import digits as digits
from .images import ImageSet as ImageSet
from .images import from_array as from_array
from .images import load_images as load_images
from .testbeds import GradedBed as GradedBed
from .testbeds import PromptBed as PromptBed
from .testbeds import graded as graded
from .testbeds import prompts as prompts

__all__ = [
    "GradedBed",
    "ImageSet",
    "PromptBed",
    "digits",
    "from_array",
    "graded",
    "load_images",
    "prompts",
]
