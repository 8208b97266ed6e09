# %% [markdown]
# # Exact worlds: what memorization looks like when nothing is estimated
#
# A diffusion model is a score, $s(x, \sigma) = \nabla_x \log p_\sigma(x)$, of data blurred by
# noise of size $\sigma$. Here the score is not learned: it is the closed form of a density in
# which we put the stored points ourselves. So every number a detector gives can be laid beside
# the truth.
#
# ## A world with five stored points
#
# Two broad clouds of ordinary data, and five points that the model has stored: components of
# variance zero, with two percent of the probability each.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import memjax as mj

stored = jnp.array([[-1.9, 0.9], [-0.6, -0.5], [0.5, 1.6], [1.4, 0.2], [2.4, -1.3]])
clouds = jnp.array([[-1.2, 0.0], [1.3, 0.2]])
covariances = np.zeros((7, 2, 2))
covariances[0] = [[0.5, -0.25], [-0.25, 0.5]]
covariances[1] = [[0.6, 0.3], [0.3, 0.7]]
world = mj.GaussianMixture(
    [0.45, 0.45] + 5 * [0.02], jnp.concatenate([clouds, stored]), covariances
)

# %% [markdown]
# ## A detector, and the closed form beside it
#
# FLIPD asks a score for the local dimension of its density: linearize the field at the point,
# take the trace of the Jacobian and the norm of the score. These lines work for any score, a
# network's too. A density knows the answer without differentiating anything: $d +
# \sigma^2\,\mathrm{tr}\,H$ is its effective dimension,
# $\mathrm{tr}\,\mathrm{Cov}[x_0|x]/\sigma^2$.


# %%
def flipd(score, x, sigma):
    lin = mj.linearize(mj.at(score, sigma), x)
    return x.size + sigma**2 * (lin.trace() + jnp.sum(lin.value**2))


def flipd_exact(density, x, sigma):
    score = density.score(x, sigma)
    return density.effective_dimension(x, sigma) + sigma**2 * jnp.sum(score**2)


ordinary = world.sample(jax.random.key(0), 400, 0.0)
ordinary = ordinary[~(ordinary[:, None] == stored[None]).all(axis=2).any(axis=1)]
points = jnp.concatenate([stored, ordinary[:5]])
sigma = 0.02
by_score = jax.jit(lambda s, xs: jax.vmap(lambda x: flipd(s, x, sigma))(xs))(world, points)
by_formula = jax.jit(lambda d, xs: jax.vmap(lambda x: flipd_exact(d, x, sigma))(xs))(world, points)

distance = jnp.linalg.norm(points[:, None] - stored[None], axis=2).min(axis=1)

print("            FLIPD   closed form   nearest stored point at")
for k, row in enumerate(zip(by_score, by_formula, distance, strict=True)):
    kind = "stored  " if k < 5 else "ordinary"
    print("{} {:8.4f} {:13.4f} {:18.3f}".format(kind, *map(float, row)))

# %% [markdown]
# At the stored points the density has dimension close to zero, at ordinary ones two, the
# dimension of the plane. The last ordinary point lies so close to a stored one that at this noise
# the two compete, and the number is no longer a dimension. Detector and formula agree to the
# digits shown.
#
# ## Where a stored point reaches
#
# The effective dimension everywhere in the plane, at three noise levels. At small noise every
# stored point sits in a hole in which the posterior knows the answer: no direction is left free.
# With more noise the holes inside the clouds fade, because ordinary data explains $x$ as well;
# those at the edge grow. On the rim of a hole, and on the ridge between the clouds, the posterior
# hesitates between two answers and the effective dimension exceeds two.

# %%
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
STORED, ORDINARY = "#D55E00", "#0072B2"
side = jnp.linspace(-3.5, 3.5, 281)
grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)


def on_grid(quantity):
    """A quantity of the world at every point of the grid."""
    values = jax.jit(lambda d, xs: jax.vmap(lambda x: quantity(d, x))(xs))(world, grid)
    return np.asarray(values).reshape(len(side), len(side))


def show(axis, values, **options):
    extent = (-3.5, 3.5, -3.5, 3.5)
    picture = axis.imshow(values, origin="lower", extent=extent, **options)
    axis.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    return picture


figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5), sharey=True, layout="constrained")
for axis, sigma in zip(axes, (0.08, 0.16, 0.4), strict=True):
    values = on_grid(lambda d, x, sigma=sigma: d.effective_dimension(x, sigma))
    picture = show(axis, values, vmin=0, vmax=4, cmap="cividis")
    axis.scatter(*stored.T, s=190, facecolors="none", edgecolors="white", linewidths=1.4)
    axis.set_title(rf"$\sigma$ = {sigma}")
bar = figure.colorbar(picture, ax=axes, extend="max", shrink=0.86)
bar.set_label("effective dimension")
figure.suptitle("Effective dimension; circles mark the stored points", fontsize=11)
plt.show()

# %% [markdown]
# ## The p-Laplacian
#
# Another question to the same score: does the vector field point inward? The p-Laplacian
# $\mathrm{div}(|s|^{p-2} s)$ is negative at an attractor. For $p = 1$ only directions count, for
# $p = 2$ it is the Laplacian, $p = \infty$ is the second derivative along the score. Each is
# shown times the power of $\sigma$ that makes it a pure number.

# %%
sigma = 0.16
figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5), sharey=True, layout="constrained")
panels = (
    ("p = 1", sigma, lambda d, x: d.p_laplacian(x, sigma, 1)),
    ("p = 2", sigma**2, lambda d, x: d.p_laplacian(x, sigma, 2)),
    (
        r"p = $\infty$, normalized",
        sigma**2,
        lambda d, x: d.p_laplacian(x, sigma, np.inf, normalized=True),
    ),
)
for axis, (title, scale, quantity) in zip(axes, panels, strict=True):
    picture = show(axis, scale * on_grid(quantity), vmin=-2, vmax=2, cmap="PuOr_r")
    axis.scatter(*stored.T, s=190, facecolors="none", edgecolors="black", linewidths=1.1)
    axis.set_title(title)
bar = figure.colorbar(picture, ax=axes, extend="both", shrink=0.86)
bar.set_label("negative: attractor")
figure.suptitle(rf"p-Laplacian of $\log p_\sigma$ at $\sigma$ = {sigma}", fontsize=11)
plt.show()

# %% [markdown]
# All three are negative at the stored points. $p = 1$ is so too where the score vanishes inside a
# cloud: it sees that something attracts, not how narrow it is. $p = 2$ and $p = \infty$ do
# measure the width, and are close to zero in the clouds.
#
# ## Sixty-four dimensions
#
# The same with handwritten digits of 8 x 8 pixels. A Gaussian fitted to all digits plays the
# model that has learned what digits look like; twelve digits are stored on top, at a thousandth
# of the probability each. How does the effective dimension at a clean image change with the
# noise?

# %%
digits = jnp.asarray(load_digits().images / 8 - 1, jnp.float32)[..., None]
data_std = float(digits.std())
kept, rest = digits[::150], digits[1::150]
flat = np.asarray(digits).reshape(len(digits), -1)
general = mj.GaussianMixture(
    [1 - 0.001 * len(kept)] + len(kept) * [0.001],
    jnp.concatenate([digits.mean(axis=0)[None], kept]),
    np.concatenate([np.cov(flat.T)[None], np.zeros((len(kept), 64, 64))]),
)
levels = jnp.geomspace(0.01, 10, 61) * data_std


@jax.jit
def profiles(density, xs):
    """Effective dimension and FLIPD of each image at each noise level."""

    def one(x, sigma):
        return density.effective_dimension(x, sigma), flipd_exact(density, x, sigma)

    return jax.vmap(lambda x: jax.vmap(lambda sigma: one(x, sigma))(levels))(xs)


def draw(axis, rows, color, label, style="-"):
    for k, row in enumerate(rows):
        axis.plot(
            levels / data_std, row, style, color=color, lw=1.2, label=label if k == 0 else None
        )


figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
draw(axis, profiles(general, rest)[0], ORDINARY, "ordinary digits")
draw(axis, profiles(general, kept)[0], STORED, "stored digits", "--")
axis.set(
    xscale="log", xlabel=r"$\sigma$ / standard deviation of the data", ylabel="effective dimension"
)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# At a stored digit no direction is free until the noise is about as large as the data's standard
# deviation. An ordinary digit keeps the many directions in which digits vary. A few ordinary
# digits dip in between: at that noise they are taken for a stored digit that resembles them.
#
# ## The model that stores everything
#
# The density of a training set itself is what perfect training would reach. Its score takes one
# pass over the images.

# %%
unseen = digits[::150]
training = jnp.asarray(np.delete(np.asarray(digits), np.s_[::150], axis=0))
memorizer = mj.Empirical(training)
seen = training[::150]

figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True, layout="constrained")
for axis, name, blue, orange in zip(
    axes,
    ("effective dimension", "FLIPD"),
    profiles(memorizer, unseen),
    profiles(memorizer, seen),
    strict=True,
):
    draw(axis, blue, ORDINARY, "unseen digits")
    draw(axis, orange, STORED, "training digits", "--")
    axis.set(xscale="log", xlabel=r"$\sigma$ / standard deviation of the data", title=name)
axes[0].set_yscale("symlog", linthresh=10)
axes[0].set(ylim=(-1, 3e5), ylabel="dimension")
axes[1].legend(frameon=False)
plt.show()

nearest = jnp.sort(jnp.sum((unseen[:, None] - training[None]) ** 2, axis=(2, 3, 4)), axis=1)
print(
    "unseen digits with two nearest training digits:", int(jnp.sum(nearest[:, 0] == nearest[:, 1]))
)

# %% [markdown]
# At small noise the effective dimension is zero at unseen digits too: whatever the image, one
# training digit explains it alone. (The one exception is exactly as far from two training digits,
# between which the posterior cannot choose.) FLIPD adds $\sigma^2 |s|^2$, which grows with the
# distance to the nearest training digit, and tells seen from unseen at every noise below half the
# standard deviation of the data.
