from .conditional import ConditionalMixture as ConditionalMixture
from .density import Density as Density
from .density import Posterior as Posterior
from .empirical import Empirical as Empirical
from .gaussian import FlowMap as FlowMap
from .gaussian import Gaussian as Gaussian
from .mixture import GaussianMixture as GaussianMixture

__all__ = [
    "ConditionalMixture",
    "Density",
    "Empirical",
    "FlowMap",
    "Gaussian",
    "GaussianMixture",
    "Posterior",
]
