from .conditional import ConditionalMixture as ConditionalMixture
from .density import Density as Density
from .density import Posterior as Posterior
from .empirical import Empirical as Empirical
from .gaussian import FlowMap as FlowMap
from .gaussian import Gaussian as Gaussian
from .mixture import GaussianMixture as GaussianMixture
from .planted import PlantedMixture as PlantedMixture
from .planted import planted_mixture as planted_mixture

__all__ = [
    "ConditionalMixture",
    "Density",
    "Empirical",
    "FlowMap",
    "Gaussian",
    "GaussianMixture",
    "PlantedMixture",
    "Posterior",
    "planted_mixture",
]
