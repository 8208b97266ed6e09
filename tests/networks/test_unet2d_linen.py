"""The trainable U-Net of diffusers: its weights are those that the published network wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks import LinenUNet2D, UNet2DModel

X = jnp.zeros((4, 4, 2), jnp.float32)


@pytest.mark.parametrize(
    "module",
    [
        LinenUNet2D((8, 16), groups=4),
        LinenUNet2D((8,), num_blocks=2, groups=2, attention=True),
        LinenUNet2D((4, 4, 8), groups=2, attention=True, num_conditions=5),
    ],
    ids=["plain", "one level", "attention and conditions"],
)
def test_init_makes_every_array_of_the_published_network_and_no_other(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, jnp.float32(0))["params"]
    options = module.options(2)
    network = UNet2DModel.from_weights(shapes, options._asdict())
    assert network.options == options
    out = jax.eval_shape(lambda w: module.apply({"params": w}, X, jnp.float32(0)), shapes)
    assert out.shape == X.shape


def test_initial_weights():
    module = LinenUNet2D((16, 32), groups=4, attention=True, num_conditions=40)
    made = jax.jit(module.init)(jax.random.key(0), X, jnp.float32(0))["params"]
    assert not np.any(made["conv_out.weight"])
    assert np.all(made["mid_block.attentions.0.group_norm.weight"] == 1)
    assert not np.any(made["mid_block.attentions.0.to_q.bias"])
    for name, inputs in {
        "mid_block.resnets.0.conv1.weight": 9 * 32,
        "mid_block.attentions.0.to_q.weight": 32,
        "class_embedding.weight": 64,
    }.items():
        weight = np.asarray(made[name], np.float64)
        # The mean square of n normal numbers has a relative standard deviation of sqrt(2/n).
        assert np.mean(weight**2) * inputs == pytest.approx(1, abs=5 * np.sqrt(2 / weight.size))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="channels: expected multiples of groups = 8"):
        LinenUNet2D((12,)).options(1)
    with pytest.raises(InputError, match="x: expected an image"):
        LinenUNet2D().init(jax.random.key(0), jnp.zeros(4), jnp.float32(0))
    plain = LinenUNet2D((8,))
    with pytest.raises(InputError, match="condition: expected None"):
        jax.eval_shape(plain.init, jax.random.key(0), X, jnp.float32(0), jnp.int32(1))
