# %% [markdown]
# # Detectors: what they look at, what they cost, what they find
#
# A detector declares the evaluations of the score that it needs: at the image, at points around
# it, products with the Jacobian, flows. memjax makes the union of what several detectors need
# once, and each finishes from the evidence. So asking a second question about the same image is
# often free.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from memjax.detect import (
    FLIPD,
    EffectiveDimension,
    FluxDimension,
    NormalizedVolumeGrowth,
    PLaplace,
    PLaplaceFlux,
    ScoreNorm,
    Sharpness,
    SphereLoss,
    cost,
    estimate_multiplicity,
    evaluate_detectors,
)
from memjax.evaluate import auroc
from memjax.training import graded_testbed

plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
testbed = graded_testbed(seed=0)
multiplicity = np.asarray(testbed.bed.multiplicity)
images = jnp.asarray(testbed.bed.images)
d = images[0].size

sigma = 0.1 * testbed.model.data_std
detectors = (
    ScoreNorm(sigma),
    PLaplaceFlux(sigma, p=1),
    PLaplaceFlux(sigma, p=2),
    FluxDimension(sigma),
    SphereLoss(sigma),
    FLIPD(sigma),
    EffectiveDimension(sigma),
    PLaplace(sigma, p=2),
    Sharpness(sigma),
)
print("one by one:", sum(cost((detector,), d).total for detector in detectors), "products")
print("together:  ", cost(detectors, d).total, "products an image")

# %% [markdown]
# Nine numbers for a quarter of the products: p = 1 and p = 2, the dimension read off the flux and
# the sphere loss share 32 evaluations on one sphere; FLIPD, the effective dimension, the Laplacian
# and the spectrum share one Jacobian at the image.
#
# ## On 1,797 digits with planted duplicates
#
# The model was trained on 1,000 digits, some of them repeated up to 32 times; 797 are held out.
# Every value is oriented: larger means more memorized.


# %%
@partial(jax.jit, static_argnames="detectors")
def evaluate(model, images, key, detectors):
    def one(image):
        return tuple(f.value for f in evaluate_detectors(model, image, detectors, key=key))

    return jax.lax.map(one, images, batch_size=128)


values = evaluate(testbed.model, images, jax.random.key(0), detectors)
print(f"{'AUROC':34} {'x2 / once':>10} {'x4 / once':>10} {'once / unseen':>14}")
for detector, value in zip(detectors, values, strict=True):
    title = detector.title + (f", p = {detector.p}" if hasattr(detector, "p") else "")
    row = []
    for positive, negative in ((2, 1), (4, 1), (1, 0)):
        rows = (multiplicity == positive) | (multiplicity == negative)
        row.append(auroc(np.asarray(value)[rows], (multiplicity == positive)[rows]).value)
    print(f"{title:34} {row[0]:10.3f} {row[1]:10.3f} {row[2]:14.3f}")

# %% [markdown]
# Two kinds of answer come out. Statistics with the *length* of the score at or near the image
# (score norm, flux at p = 1, sphere loss, FLIPD) tell what the model was trained on at all.
# Statistics of the *curvature* alone (effective dimension, p = 2, the spectrum) are blind to that
# and tell what was repeated.

# %%
groups = (0, 1, 2, 4, 8, 16, 32)
figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
for axis, chosen in zip(axes, (1, 4, 8), strict=True):
    value = np.asarray(values[chosen])
    axis.boxplot(
        [value[multiplicity == m] for m in groups],
        tick_labels=["held\nout", *map(str, groups[1:])],
        widths=0.6,
        flierprops={"markersize": 2, "alpha": 0.3},
        medianprops={"color": "#D55E00"},
    )
    axis.set_title(detectors[chosen].title)
axes[0].set_ylabel("value (larger = more memorized)")
figure.supxlabel("times in the training set", fontsize=10)
plt.show()

# %% [markdown]
# ## How many products does it take?
#
# The flux needs no derivative of the network, and few directions: pairs of opposite ones cancel
# what varies most. The standard error says how far the choice of directions moved each value.

# %%
for num_pairs in (1, 4, 16):
    detector = PLaplaceFlux(sigma, num_pairs=num_pairs)
    (value,) = evaluate(testbed.model, images, jax.random.key(0), (detector,))
    rows = (multiplicity == 2) | (multiplicity == 1)
    area = auroc(np.asarray(value)[rows], (multiplicity == 2)[rows])
    print(
        f"{cost((detector,), d).total:3} products: x2 against once, AUROC {area.value:.3f} "
        f"[{area.low:.3f}, {area.high:.3f}]"
    )

# %% [markdown]
# ## At every noise level
#
# What a model has stored shows in a band of noise levels. Below it the network was hardly trained;
# above it every image looks alike. Below zero, which no exact score gives, the network overshoots.
# The growth of volume along the flow integrates over a band.

# %%
levels = np.geomspace(0.02, 1.0, 9)
rng = np.random.default_rng(0)
few = np.concatenate(
    [rng.permutation(np.flatnonzero(multiplicity == m))[:16] for m in (0, 1, 4, 32)]
)
profile = tuple(FLIPD(float(level * testbed.model.data_std)) for level in levels)
curves = -d * np.asarray(evaluate(testbed.model, images[few], jax.random.key(0), profile))
figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
colors = ("#999999", "#0072B2", "#E69F00", "#D55E00")
for k, (name, color) in enumerate(
    zip(("never seen", "seen once", "4 times", "32 times"), colors, strict=True)
):
    group = curves[:, 16 * k : 16 * (k + 1)]
    axis.plot(levels, np.median(group, axis=1), color=color, label=name, linewidth=2)
    axis.fill_between(levels, *np.quantile(group, (0.1, 0.9), axis=1), color=color, alpha=0.15)
axis.axhline(0, color="0.6", linewidth=0.8)
axis.set(
    xscale="log",
    xlabel="noise level, in standard deviations of the data",
    ylabel="FLIPD, dimensions",
)
axis.legend(frameon=False, title="in the training set")
axis.grid(color="0.92")
plt.show()

growth = NormalizedVolumeGrowth(0.067 * testbed.model.data_std)
(value,) = evaluate(testbed.model, images[few], jax.random.key(0), (growth,))
for k, name in enumerate(("never seen", "seen once", "4 times", "32 times")):
    share = np.asarray(value)[16 * k : 16 * (k + 1)]
    print(f"volume growth, {name:10}: {share.mean():.3f} of the ceiling")

# %% [markdown]
# ## How often does each image stand there?
#
# Detectors look at the model as it is. Whoever has the training set can also ask what moves.
# Trained further on images that count too seldom, a model loses what it has stored of them; on each
# as often as it stands there, it stays as it is. The model is its own control: easy and hard images
# are told alike. The errors of this are others than those of comparing images as difficult, so both
# together tell two copies from one, with a hundred evaluations an image.

# %%
trained = np.flatnonzero(multiplicity > 0)
times = multiplicity[trained]
counted = estimate_multiplicity(testbed.model, testbed.bed.images[trained])
for k in (2, 4):
    rows = (times == k) | (times == 1)
    area = auroc(counted.value[rows], times[rows] == k)
    print(f"x{k} against once, AUROC {area.value:.4f} [{area.low:.4f}, {area.high:.4f}]")
print(f"{counted.cost.total} products an image")

figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
shown = [1, 2, 4, 8, 16, 32]
axis.boxplot(
    [counted.multiplicity[times == k] for k in shown],
    positions=np.log2(shown),
    widths=0.4,
    flierprops={"marker": ".", "markersize": 4},
    medianprops={"color": "#D55E00"},
)
axis.plot(np.log2(shown), shown, color="0.7", linewidth=1, zorder=0)
axis.set_yscale("log")
axis.set_xticks(np.log2(shown), [str(k) for k in shown])
axis.set_yticks(shown, [str(k) for k in shown])
axis.minorticks_off()
axis.set(xlabel="times in the training set", ylabel="estimated")
axis.grid(color="0.92")
plt.show()
