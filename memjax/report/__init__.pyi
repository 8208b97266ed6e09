from ._extraction import CandidatePicture as CandidatePicture
from ._extraction import Curve as Curve
from ._extraction import ScorePanel as ScorePanel
from ._extraction import draw_candidates as draw_candidates
from ._extraction import draw_curves as draw_curves
from ._extraction import draw_scores as draw_scores
from ._figures import render as render
from ._images import thumbnail as thumbnail
from ._maps import MapRow as MapRow
from ._maps import SampleRow as SampleRow
from ._maps import draw_maps as draw_maps
from ._maps import draw_samples as draw_samples
from .build import build_report as build_report

__all__ = [
    "CandidatePicture",
    "Curve",
    "MapRow",
    "SampleRow",
    "ScorePanel",
    "build_report",
    "draw_candidates",
    "draw_curves",
    "draw_maps",
    "draw_samples",
    "draw_scores",
    "render",
    "thumbnail",
]
