from ._figures import render as render
from ._images import thumbnail as thumbnail
from ._maps import MapRow as MapRow
from ._maps import SampleRow as SampleRow
from ._maps import draw_maps as draw_maps
from ._maps import draw_samples as draw_samples
from .build import build_report as build_report

__all__ = [
    "MapRow",
    "SampleRow",
    "build_report",
    "draw_maps",
    "draw_samples",
    "render",
    "thumbnail",
]
