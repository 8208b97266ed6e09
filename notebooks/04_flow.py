# %% [markdown]
# # The probability flow: where points go as noise grows, and how volume grows with them
#
# A score defines a deterministic flow between data and noise. It carries every point of the data to
# a point of the noise and stretches the volume around it on the way. How much says two things: how
# likely the point is, and how large a share of the noise leads back to its neighborhood.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import memjax as mj
from memjax.evaluate import auroc, tpr_at_fpr
from memjax.training import graded_testbed

plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
RED, BLUE = "#CC3311", "#0077BB"

# %% [markdown]
# ## Trajectories in one dimension
#
# A mixture of a broad component at -1 and a narrow one at 2, nearly a stored point, with weight
# 0.2. `dense=True` returns the trajectory as a function of the noise level. Both axes are scaled so
# that data and noise fit into one picture; shading is the density at each level.

# %%
mixture = mj.GaussianMixture(
    weights=jnp.array([0.8, 0.2]), means=jnp.array([[-1.0], [2.0]]), covariances=[0.36, 1e-4]
)
sigma0, sigma1 = 0.02, 20.0
flow = mj.probability_flow(mixture, sigma0, sigma1, dense=True)
broad = mixture.means[0] + 0.6 * jnp.linspace(-2, 2, 17)[:, None]
narrow = mixture.means[1] + 0.02 * jnp.linspace(-2, 2, 7)[:, None]
starts = jnp.concatenate([broad, narrow])
sigmas = jnp.geomspace(sigma0, sigma1, 121)


@jax.jit
def trajectories(flow, starts):
    def follow(x):
        out = flow(x)
        return jax.vmap(out.path)(sigmas)[:, 0], out.status

    return jax.vmap(follow)(starts)


paths, status = trajectories(flow, starts)
spread = jnp.sqrt(1 + sigmas**2)
y = jnp.linspace(-3.5, 3.5, 301)
points = (y[:, None] * spread)[..., None]
log_density = jax.vmap(jax.vmap(mixture.log_prob, in_axes=(0, 0)), in_axes=(0, None))(
    points, sigmas
) + jnp.log(spread)

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
axis.pcolormesh(sigmas, y, jnp.exp(log_density), cmap="Greys", vmax=0.8, shading="gouraud")
for k, path in enumerate(paths):
    axis.plot(sigmas, path / spread, lw=0.8, color=BLUE if k < len(broad) else RED)
axis.set(xscale="log", xlabel="noise level sigma", ylabel="x / sqrt(1 + sigma²)")
axis.set_title("blue: from the broad component, red: from the narrow one")
plt.show()

first, last = paths[len(broad)], paths[-1]
middle = len(broad) + 3
stretch = float((paths[middle + 1, -1] - paths[middle - 1, -1]) / (starts[-3] - starts[-5])[0])
before, after = (float(last[k] - first[k]) for k in (0, -1))
print(f"all solved: {bool((status == 0).all())}")
print(f"the red points spread from {before:.2f} to {after:.1f}, {after / sigma1:.2f} sigma")
print(f"the noise ratio is {sigma1 / sigma0:.0f}, the stretch of the middle one {stretch:.0f}")

# %% [markdown]
# ## Volume growth and the effective dimension
#
# The volume around a point grows at the rate d - d_eff per unit of log sigma, where d_eff is the
# number of directions that the score leaves free at that noise. A point stored alone has d_eff = 0
# throughout and reaches the ceiling d log(sigma1/sigma0). Here are a point of a narrow component in
# 8 dimensions and one of a broad one.

# %%
d = 8
world = mj.GaussianMixture(
    weights=jnp.array([0.95, 0.05]),
    means=jnp.zeros((2, d)).at[1, 0].set(3.0),
    covariances=[1.0, 1e-4],
)
flow = mj.probability_flow(world, 0.01, 20.0, divergence="exact", solver="rk4", num_steps=40)
growth = jax.jit(jax.vmap(mj.volume_growth(flow)))
keys = jax.random.split(jax.random.key(0), 3)
pair = jnp.stack(
    [
        world.means[1] + 0.014 * jax.random.normal(keys[0], (d,)),
        world.means[0] + 1.0 * jax.random.normal(keys[1], (d,)),
    ]
)
out = growth(pair)

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for k, (name, color) in enumerate((("narrow", RED), ("broad", BLUE))):
    axis.plot(out.profile.sigmas[k], out.profile.effective_dimensions[k], color=color, label=name)
    print(
        f"{name:6}: log volume {out.log_volume[k]:6.2f} of at most {out.ceiling[k]:.2f} nats, "
        f"normalized {out.normalized[k]:.3f}, solver error below {out.solver_error[k]:.1e} nats"
    )
axis.set(xscale="log", xlabel="noise level sigma", ylabel="d_eff", ylim=(-0.2, d + 0.2))
axis.legend(frameon=False, title="component")
plt.show()

# %% [markdown]
# The narrow component is pinned from a few times its own width of 0.01 on, until at sigma = 1 the
# broad one comes into sight. The area under a curve, over log sigma, is what is missing to the
# ceiling.
#
# ## Log-likelihood
#
# The same log volume and the density of the latent point give log p. Nothing but the score is used,
# and here the answer is known.

# %%
points = world.sample(keys[2], 5, 0.01)
evaluate = jax.jit(jax.vmap(mj.log_likelihood(flow, data_std=1.0)))(points)
exact = jax.vmap(lambda x: world.log_prob(x, 0.01))(points)
print("log p by the flow   exact log p   (nats; 40 steps, normal prior at sigma = 20)")
for value, truth in zip(evaluate.value, exact, strict=True):
    print(f"{value:17.3f} {truth:13.3f}")

# %% [markdown]
# The rest is the normal prior: the mixture at sigma = 20 is only nearly normal. With the exact
# prior, what is left is the solver.

# %%
exact_prior = jax.jit(jax.vmap(mj.log_likelihood(flow, prior=world.log_prob)))(points)
for name, found in (("normal", evaluate), ("exact", exact_prior)):
    print(f"{name:6} prior: largest error {float(jnp.max(jnp.abs(found.value - exact))):.1e} nats")

# %% [markdown]
# ## A learned score: digits stored 32 times, and digits seen once
#
# The test bed of 8 by 8 digits, with noise from 0.05 to 0.4. The starting points are the clean
# images. Eight probes instead of all 64 directions: the error bar is theirs; that of the solver
# is printed beside it. All images share the probes.

# %%
testbed = graded_testbed(seed=0)
multiplicity = testbed.bed.multiplicity
images = jnp.asarray(testbed.bed.images)
options = {"solver": "rk4", "num_steps": 32}
sampled = mj.probability_flow(
    testbed.model, 0.05, 0.4, divergence="hutchinson", num_products=8, **options
)
exact = mj.probability_flow(testbed.model, 0.05, 0.4, divergence="exact", **options)
rows = np.array([np.flatnonzero(multiplicity == m)[0] for m in (32, 1)])
key = jax.random.key(1)
estimates = jax.jit(jax.vmap(mj.volume_growth(sampled), in_axes=(0, None)))(images[rows], key)
truth = jax.jit(jax.vmap(mj.volume_growth(exact, solver_error=False)))(images[rows])

figure, axes = plt.subplots(
    1, 3, figsize=(9.6, 2.9), width_ratios=(1, 1, 3.4), layout="constrained"
)
for k, (row, color) in enumerate(zip(rows, (RED, BLUE), strict=True)):
    axes[k].imshow(images[row, ..., 0], cmap="gray", vmin=-1, vmax=1)
    axes[k].set(xticks=[], yticks=[], title=f"stands {multiplicity[row]} times")
    profile = jax.tree.map(lambda leaf, k=k: leaf[k], estimates.profile)
    low = profile.effective_dimensions - 2 * profile.standard_errors
    high = profile.effective_dimensions + 2 * profile.standard_errors
    axes[2].fill_between(profile.sigmas, low, high, color=color, alpha=0.2, lw=0)
    axes[2].plot(profile.sigmas, profile.effective_dimensions, color=color, lw=1)
    axes[2].plot(
        truth.profile.sigmas[k],
        truth.profile.effective_dimensions[k],
        "--",
        color=color,
        lw=1,
    )
    print(
        f"stands {multiplicity[row]:2} times: normalized growth {estimates.normalized[k]:.3f} +- "
        f"{estimates.standard_error[k] / estimates.ceiling[k]:.3f} (probes), solver error below "
        f"{estimates.solver_error[k] / estimates.ceiling[k]:.0e}; exact divergence "
        f"{truth.normalized[k]:.3f}"
    )
axes[2].axhline(0, color="0.85", lw=1, zorder=0)
axes[2].set(xscale="log", xlabel="noise level sigma", ylabel="d_eff of 64")
axes[2].set_xticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
axes[2].minorticks_off()
axes[2].set_title("8 probes, two standard errors; dashed: exact")
plt.show()

# %% [markdown]
# At the stored digit d_eff falls below zero, which an exact score's cannot: the learned one is not
# exact.
#
# ## Which noise tells how often an image was repeated
#
# The growth of volume per unit of log noise, as a share of what it can be, is 1 - d_eff/d. Here it
# is along the flow from each clean image, by how often the image stands in the training set:
# medians and the middle eight tenths of each group.

# %%
rng = np.random.default_rng(0)
groups = {0: "held out", 1: "once", **{m: f"{m} times" for m in (2, 4, 8, 16, 32)}}
shown = np.concatenate([rng.permutation(np.flatnonzero(multiplicity == m))[:100] for m in groups])
along = mj.probability_flow(
    testbed.model, 0.02, 2.0, divergence="exact", solver="heun", num_steps=16
)


@jax.jit
def rates(flow, images):
    def rate(x):
        profile = flow(x).profile
        return profile.sigmas, 1 - profile.effective_dimensions / x.size

    return jax.lax.map(rate, images, batch_size=64)


sigmas, growth_rates = (np.asarray(a) for a in rates(along, images[shown]))
figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
shades = ["0.5", *plt.get_cmap("plasma_r")(np.linspace(0.15, 1, len(groups) - 1))]
for (m, name), color in zip(groups.items(), shades, strict=True):
    own = growth_rates[multiplicity[shown] == m]
    low, middle, high = np.quantile(own, (0.1, 0.5, 0.9), axis=0)
    axis.fill_between(sigmas[0], low, high, color=color, alpha=0.12, lw=0)
    axis.plot(sigmas[0], middle, color=color, label=name)
axis.axhline(1, color="0.6", lw=0.8, ls=":")
axis.set(xscale="log", xlabel="noise level sigma", ylabel="volume growth rate / d")
axis.legend(frameon=False, fontsize=8, title="in the training set", title_fontsize=8)
plt.show()

# %% [markdown]
# Groups are apart below the noise at which other digits come into sight; against the spread
# within a group, four times and once are so most at 0.04 to 0.1. "Once" and "held out" are not:
# growth tells repetition, hardly membership.
#
# ## The detector
#
# `NormalizedVolumeGrowth` goes from sigma to 3 sigma, here from 0.05 standard deviations of the
# data on, in two steps of Heun's rule. 16 probes instead of all 64 directions: 85 network products
# an image.

# %%
sigma = 0.05 * testbed.model.data_std
detectors = (
    mj.detect.NormalizedVolumeGrowth(sigma),
    mj.detect.NormalizedVolumeGrowth(sigma, num_probes=16),
)


@jax.jit
def evaluate_all(model, images, key):
    def one(x):
        found = mj.detect.evaluate_detectors(model, x, detectors, key=key)
        return [(f.value, f.standard_error) for f in found]

    return jax.lax.map(one, images, batch_size=64)


(values, _), (probed, _) = evaluate_all(testbed.model, images, key)
for detector, found in zip(detectors, (values, probed), strict=True):
    products = mj.detect.cost((detector,), images[0].size).total
    for m in (2, 4, 8):
        rows = (multiplicity == m) | (multiplicity == 1)
        labels = multiplicity[rows] == m
        area = auroc(np.asarray(found)[rows], labels)
        rate = tpr_at_fpr(np.asarray(found)[rows], labels, fpr=0.01)
        print(
            f"{products:3} products, {m} times against once: AUROC {area.value:.3f} "
            f"[{area.low:.3f}, {area.high:.3f}], TPR at 1 % FPR {rate.value:.2f} "
            f"[{rate.low:.2f}, {rate.high:.2f}]"
        )

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for place, m in enumerate(groups):
    own = np.asarray(values)[multiplicity == m]
    offsets = np.linspace(-0.25, 0.25, len(own))
    axis.plot(place + offsets, own, "o", ms=3, color=BLUE, alpha=0.5, mew=0)
    axis.plot([place - 0.3, place + 0.3], [np.median(own)] * 2, color=RED, lw=1.5)
axis.axhline(1, color="0.6", lw=0.8, ls=":")
axis.set_xticks(range(len(groups)), [str(m) for m in groups])
axis.set(xlabel="times in the training set", ylabel="normalized volume growth")
plt.show()
