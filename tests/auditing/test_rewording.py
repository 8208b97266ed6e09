"""What of a text's condition other words may change."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.auditing.mitigation import mitigate
from memjax.diffusion import Model
from memjax.networks import TextCondition


class Drawn(eqx.Module):
    """A Gaussian that every number of the condition moves."""

    mix: Array

    def __call__(self, x, sigma, condition=None):
        told = jnp.stack([jnp.sum(leaf) for leaf in condition])
        return (self.mix * jnp.sum(told) - x) / (1 + sigma**2)


def test_sizes_and_the_strength_of_guidance_stay():
    told = TextCondition(np.zeros((3, 2)), np.zeros(2), np.full(2, 64.0), np.ones(()))
    null = jax.tree.map(np.float32, told)
    model = Model(
        Drawn(jnp.ones(4, jnp.float32)),
        (4,),
        sigma_min=0.01,
        sigma_max=20.0,
        data_std=1.0,
        null_condition=null,
    )
    one = null._replace(hidden_states=null.hidden_states + 1, pooled=null.pooled + 1)
    prompts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    found = mitigate(model, prompts, method="prompt", num_samples=2)
    assert (found.objective_after < found.objective_before).all()
    for name in ("hidden_states", "pooled"):
        assert not np.allclose(getattr(found.conditions, name), getattr(prompts, name))
    for name in ("time_ids", "guidance"):
        np.testing.assert_array_equal(getattr(found.conditions, name), getattr(prompts, name))
