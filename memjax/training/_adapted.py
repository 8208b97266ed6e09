"""A model that is trained further: the weights that change, and the model they make."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from memjax._core.errors import InputError
from memjax.diffusion.combine import Score
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, PredictionScore
from memjax.networks.lora import merge_adapters
from memjax.training._steps import Family, RawNetwork


class Adapted(Family):
    """A score that stays as it is, with changes of low rank and changed weights in it.

    Attributes:
        score: that of the model.
        scale: of the changes of low rank.
        data_std: of the preconditioning.
        null: the condition where none is given.
    """

    score: PredictionScore
    scale: float = eqx.field(static=True)
    data_std: float = eqx.field(static=True)
    null: PyTree = None

    def __call__(self, weights: PyTree) -> RawNetwork:
        score, d = merge_adapters(self.score, weights, self.scale), self.data_std
        denoiser = score.network
        edm = isinstance(denoiser, EDMPreconditioned) and score.prediction == "denoiser"

        def raw(x, sigma, condition):
            condition = self.null if condition is None else condition
            if edm:
                return denoiser.network(x, jnp.log(sigma) / 4, condition)
            # The noise that is predicted, (sigma x - d F)/total, solved for F.
            total = jnp.sqrt(sigma**2 + d**2)
            noise = -sigma * score(total * x, sigma, condition)
            return (sigma * x - total * noise) / d

        return raw


def network_score(model: Model) -> PredictionScore:
    """The model's score, if it is that of a network."""
    score = model.raw_score
    if not isinstance(score, PredictionScore):
        raise InputError(f"model: expected the score of a network, got {type(score).__name__}")
    return score


def check_event(images: np.ndarray, model: Model) -> None:
    """Refuse images of another shape than the model's."""
    if images.shape[1:] != model.event_shape:
        raise InputError(
            f"images: expected shape [n, *{list(model.event_shape)}], got {list(images.shape)}"
        )


def recipe_of(
    model: Model, score: PredictionScore, mean: float | None, std: float | None
) -> tuple[float, float, float]:
    """The preconditioning's data_std, and mean and standard deviation of log sigma.

    ``None`` for the middle of the model's range, and a sixth of it: what ``train`` sees.
    """
    low, high = np.log([model.sigma_min, model.sigma_max])
    edm = isinstance(score.network, EDMPreconditioned)
    return (
        score.network.data_std if edm else model.data_std,
        float(low + high) / 2 if mean is None else mean,
        float(high - low) / 6 if std is None else std,
    )


def changed_model(model: Model, score: Score, null_condition: PyTree) -> Model:
    """The model with another score: no longer that of the files it was read from."""
    return Model(
        score,
        model.event_shape,
        sigma_min=model.sigma_min,
        sigma_max=model.sigma_max,
        data_std=model.data_std,
        null_condition=null_condition,
        encode=model.encode,
        decode=model.decode,
        origin=dataclasses.replace(model.origin, folder="", sha256=()),
    )
