# %% [markdown]
# # Other people's models
#
# Diffusion models are published as folders of PyTorch weights. memjax reads them without PyTorch:
# the network runs in JAX from its own named arrays, the scheduler's configuration says how its
# output becomes a score, and from there on every operator and detector works as on our own models.
#
# The folder here is a `UNet2DModel` of diffusers with 8,000 random weights that PyTorch wrote, with
# PyTorch's own outputs beside it.

# %%
import json
import shutil
import tempfile
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import memjax as mj
from memjax.checkpoints import inspect_model
from memjax.diffusion import DiscreteVP
from memjax.networks import TextCondition

plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
golden = Path("../tests/networks/golden/unet2d-ddpm")
folder = Path(tempfile.mkdtemp()) / "tiny-ddpm"
folder.mkdir()
shutil.copy(golden / "model.safetensors", folder / "diffusion_pytorch_model.safetensors")
reference = dict(np.load(golden / "reference.npz"))
config = json.loads((golden / "config.json").read_text())
config["sample_size"] = list(reference["x"].shape[:2])
(folder / "config.json").write_text(json.dumps(config))
scheduler = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": True,
}
(folder / "scheduler_config.json").write_text(json.dumps(scheduler))

found = inspect_model(folder)
print(found.network, sum(part.parameters for part in found.parts), "weights;", found.schedule)
print(found.prediction, found.event_shape, "sigma", found.sigma_min, "to", found.sigma_max)

# %% [markdown]
# `memjax inspect FOLDER` prints the same and more, from the headers alone. Samplers' options
# (`clip_sample` here) change samples, not the density, and are left out.
#
# Loading checks every array by name and shape, and runs no code that a file contains. The network
# is the one PyTorch ran:

# %%
model = mj.load(folder)
network = model.raw_score.network
x, t = jnp.asarray(reference["x"], jnp.float32), jnp.asarray(reference["t"])
y, jv = jax.jvp(lambda x: network(x, t), (x,), (jnp.asarray(reference["v"], jnp.float32),))
print("value against PyTorch:  ", float(jnp.max(jnp.abs(y - reference["y"]))))
print("J v against PyTorch:    ", float(jnp.max(jnp.abs(jv - reference["jv"]))))

# %% [markdown]
# ## One score
#
# The network was trained on $x_t = \alpha_t x_0 + \sigma_t n$ and predicts $n$. The model is a
# score in the coordinates of all of memjax, $x = x_0 + \sigma n$ with
# $\sigma = \sigma_t / \alpha_t$, so $s(x, \sigma) = -\hat n(\alpha_t x, t(\sigma)) / \sigma$.
# Nothing behind this door knows a schedule. An operator takes the weights as arguments, in one
# compiled program for all images:


# %%
@jax.jit
def spectrum(model, points, sigma, key):
    """The five largest retained variances, eigenvalues of I + sigma^2 sym(H), and the asymmetry."""

    def one(x, key):
        lin = mj.linearize(mj.at(model, sigma), x)
        pairs = mj.eigsh(lambda v: v + sigma**2 * lin.symmetric(v), x, key, 5)
        return pairs.values, mj.asymmetry_exact(lin), pairs.num_products

    return jax.vmap(one)(points, jax.random.split(key, len(points)))


points = 0.5 * jax.random.normal(jax.random.key(0), (4, *model.event_shape))
values, asymmetry, products = spectrum(model, points, 0.5, jax.random.key(1))
for row, a, n in zip(values, asymmetry, products, strict=True):
    print(np.asarray(row, float).round(3), f"asymmetry {a:.2f}", n, "products")

# %% [markdown]
# Random weights are no score: their Jacobian is as asymmetric as a random matrix, about 0.7, and
# the retained variances exceed 1 where they please. On a trained checkpoint these two
# numbers are the first thing to look at.
#
# ## Text
#
# Stable Diffusion and Flux are folders with an autoencoder and text encoders beside their network:
# `mj.load` brings the autoencoder along, `memjax.checkpoints.load_prompts` makes conditions of
# prompts. A network alone takes a `TextCondition` of arrays from anywhere, at any size. Flux dev
# was distilled, and says so:

# %%
golden = Path("../tests/networks/golden/flux")
flux = folder.parent / "tiny-flux"
flux.mkdir()
shutil.copy(golden / "model.safetensors", flux / "diffusion_pytorch_model.safetensors")
shutil.copy(golden / "config.json", flux)
scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
(flux / "scheduler_config.json").write_text(json.dumps(scheduler))
reference = {name: jnp.asarray(a) for name, a in np.load(golden / "reference.npz").items()}

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = mj.load(flux, sample_size=reference["x"].shape[:2])
print(textwrap.fill(str(told[0].message), 95))
text = TextCondition(
    reference["hidden_states"], reference["pooled"], guidance=reference["guidance"]
)
y = model.raw_score.network(reference["x"], reference["t"], text)
print("\nvalue against PyTorch:  ", float(jnp.max(jnp.abs(y - reference["y"]))))
score = model(reference["x"], 0.5, text)
print("score of latents", score.shape, "at sigma = 0.5, of length", f"{jnp.linalg.norm(score):.1f}")

# %% [markdown]
# ## Any other network
#
# `mj.from_torch` takes any PyTorch module, `mj.from_callable` whatever JAX can call. Here the
# network is exact: the noise that a DDPM should predict for a density with one planted point,
# written as a plain function of its weights. Once inside, it is the same score as the closed form.

# %%
schedule = DiscreteVP(beta_schedule="linear")
points = jax.random.normal(jax.random.key(2), (40, 2))
weights = {
    "means": jnp.concatenate([points, jnp.array([[2.5, 2.5]])]),
    "variances": jnp.concatenate([jnp.full(40, 0.05), jnp.array([1e-6])]),
}


def noise(weights, x_t, t):
    """What a perfect DDPM predicts: -sigma times the score of the noised mixture."""
    sigma = schedule.sigma(t)
    x = x_t * jnp.sqrt(1 + sigma**2)
    variance = weights["variances"] + sigma**2
    away = x[None] - weights["means"]
    logits = -0.5 * jnp.sum(away**2, 1) / variance - jnp.log(variance)
    share = jax.nn.softmax(logits)
    return sigma * jnp.sum((share / variance)[:, None] * away, 0)


exact = mj.from_callable(
    jax.tree_util.Partial(noise, weights),
    schedule=schedule,
    prediction="epsilon",
    event_shape=(2,),
    data_std=1.0,
)
world = mj.GaussianMixture(jnp.full(41, 1 / 41), weights["means"], weights["variances"])


@jax.jit
def effective_dimension(score, x, sigma):
    return x.size + sigma**2 * mj.linearize(mj.at(score, sigma), x).trace()


levels = jnp.geomspace(0.02, 2, 40)
curves = jax.vmap(effective_dimension, (None, None, 0))
planted, ordinary = weights["means"][-1], weights["means"][0]
fig, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for point, name, color in ((planted, "planted point", "#D55E00"), (ordinary, "other", "#0072B2")):
    ax.semilogx(levels, curves(exact, point, levels), color=color, label=f"{name}, network")
    closed = jax.vmap(world.effective_dimension, (None, 0))(point, levels)
    ax.semilogx(levels[::3], closed[::3], "o", color=color, ms=4, mfc="none", label="closed form")
ax.set_xlabel(r"noise level $\sigma$")
ax.set_ylabel(r"effective dimension, $\mathrm{tr}\, M$")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# At the planted point nothing is left to vary until the noise reaches its neighbors. On the command
# line all of this is `memjax audit FOLDER --data images/`, `memjax sample FOLDER` and, for models
# with a `UNet2DModel`, `memjax export`.
