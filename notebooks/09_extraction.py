# %% [markdown]
# # Extraction: pulling stored images out of a model that takes no prompts
#
# A model without conditions gives its training images away too: rarely by itself, often once it is
# asked in the right way. Two ways are shown here. *Denoiser fixed points* iterate samples through
# the denoiser until they stand still. *SIDE* (Chen, Ma, Liu, Dong, arXiv:2410.02467) invents labels
# by clustering the model's own samples, trains a classifier of them, and lets it guide. Neither
# needs a training image; here we have them, and count. `memjax extract digits` does all of this in
# one command, `memjax extract MODEL --out DIR` for a model of your own.
#
# The test bed is wide: 128 digits stand 8 times in the training set, 64 stand 16 times, 808 once.
# The model is trained at the first run and cached.

# %%
import jax.numpy as jnp
import numpy as np
from IPython.display import Image

from memjax.diffusion import sample
from memjax.evaluate import adaptive_distance_blocks, extraction_scores, find_copies, rarefaction
from memjax.extract import (
    find_attractors,
    guided_samples,
    polish,
    posterior_classifier,
    rank_by_density,
    surrogate_labels,
)
from memjax.report import (
    CandidatePicture,
    Curve,
    ScorePanel,
    draw_candidates,
    draw_curves,
    draw_scores,
    render,
    thumbnail,
)
from memjax.training import graded_testbed, train_classifier

testbed = graded_testbed(0, (0, 0, 128, 64, 0), num_samples=64)
bed, model = testbed.bed, testbed.model
images, times = bed.images[bed.multiplicity > 0], bed.multiplicity[bed.multiplicity > 0]
heldout = bed.images[bed.multiplicity == 0]
count = 2048


def tell(name, samples):
    """Copies of training images among samples: three times nearer to one than to any other."""
    found, wrong = find_copies(samples, images), find_copies(samples, heldout)
    print(
        f"{name:20} {found.is_copy.mean():6.1%} copies of {np.sum(found.hits > 0):3} images; "
        f"{wrong.is_copy.mean():.1%} would pass for copies of held-out ones"
    )
    return found


unguided = np.asarray(sample(model, count, key=0))
plain = tell("unguided", unguided)

# %% [markdown]
# ## Fixed points of the denoiser
#
# At a small noise level sigma the denoiser D(x) = x + sigma^2 s(x, sigma) gives a stored image back
# unchanged, and pulls everything around it in. An image that was learned in general hardly moves.
# So `x <- D(x)`, twenty or fifty times, from samples.

# %%
sigma = 0.125 * model.data_std
for steps in (1, 5, 20, 50):
    tell(f"{steps} steps", np.asarray(polish(model, jnp.asarray(unguided), sigma, num_steps=steps)))

# %% [markdown]
# Where the iteration comes to rest, and how firmly, needs no training image: starts that end at
# the same place are one attractor, and the spectral radius of the denoiser's Jacobian there is the
# share of an error that one step leaves. Attractors are ranked by that, then by hits.

# %%
found = find_attractors(model, jnp.asarray(unguided), sigma, key=0)
truth = find_copies(found.points, images)
print(
    f"{len(found.hits)} attractors from {count} samples, {int(found.stable.sum())} of them stable"
)
for first in (20, 50, 100, len(found.hits)):
    share = truth.is_copy[:first].mean()
    print(f"of the first {first:3}: {share:.0%} are training images")
reached = np.unique(truth.nearest[truth.is_copy])
for m in (8, 16, 1):
    of = np.sum(times == m)
    print(f"images that stand there x{m}: {np.sum(times[reached] == m)} of {of} reached")
print(f"{int(found.cost.total) / count:.0f} network products a sample, beside 35 to draw it")

# %% [markdown]
# The first of them, each beside the training image nearest to it; copies are framed.

# %%
pictures = [
    CandidatePicture(
        f"#{k + 1} \u00d7{found.hits[k]}",
        thumbnail(found.points[k]),
        thumbnail(images[truth.nearest[k]]),
        bool(truth.is_copy[k]),
    )
    for k in range(24)
]
Image(render(draw_candidates, pictures, "a copy of the training image on its right"), width=520)

# %% [markdown]
# ## SIDE: labels that nobody gave
#
# Clusters of 4,096 other samples of the model become labels; a classifier learns them at every
# noise level; its gradient pushes new samples towards one cluster each, drawn uniformly. How much
# the classifier knows at which noise says where a push can mean anything.

# %%
pool = np.asarray(sample(model, 4096, key=1))
clusters = surrogate_labels(pool, 100, seed=0)
classifier, report = train_classifier(pool, clusters.labels, num_classes=len(clusters.size))
print("sigma     accuracy  calibration error")
for row in zip(report.sigmas, report.accuracy, report.calibration_error, strict=True):
    print("{:7.3f}   {:6.1%}   {:6.3f}".format(*row))

# %% [markdown]
# Noises and clusters are the same for every weight. A weight of 1 brings out no more copies than
# none; beyond some weight samples leave the data, and there it helps to push only where clusters
# are decided.

# %%
weights = (0.0, 1.0, 2.0, 4.0, 8.0)
drawn = {}
for window in (None, (0.5, 5.0)):
    print("all noise levels" if window is None else "0.5 < sigma < 5 only")
    for weight in weights:
        options = {"num_clusters": len(clusters.size), "key": 2, "window": window}
        drawn[weight] = guided_samples(model, classifier, count, weight, **options)
        tell(f"weight {weight:g}", np.asarray(drawn[weight].samples))

# %% [markdown]
# Nothing needs to be trained for this. Under the density of the pool itself, each sample a point,
# the posterior of a cluster is known in closed form, and inside the window it is as good a guide.

# %%
density = posterior_classifier(pool, clusters.labels)
for weight in (2.0, 4.0):
    found = guided_samples(model, density.log_class_prob, count, weight, **options)
    tell(f"weight {weight:g}", np.asarray(found.samples))

# %% [markdown]
# AMS is the share of samples whose nearest training image lies in a band of distance, UMS the
# number of images in the band of some sample, per sample; the distance is L2 relative to what is
# usual around the sample (Carlini et al., arXiv:2301.13188). Below, the curves of distinct images:
# fixed points of the same unguided samples stand beside SIDE.

# %%
bands = [(0.0, 0.5), (0.5, 0.75), (0.75, 1.0)]
scores = {"AMS": {f"{a:g} to {b:g}": [] for a, b in bands}}
scores["UMS"] = {name: [] for name in scores["AMS"]}
for guided in drawn.values():
    blocks = adaptive_distance_blocks(np.asarray(guided.samples), images)
    for name, of in zip(
        scores["AMS"], extraction_scores(blocks, bands, distance=True), strict=True
    ):
        scores["AMS"][name].append(of.ams)
        scores["UMS"][name].append(of.ums)
percent = {
    key: {name: 100 * np.array(values) for name, values in by.items()} for key, by in scores.items()
}
panel = ScorePanel("in the window", [f"{weight:g}" for weight in weights], percent)
Image(render(draw_scores, [panel], "weight of the guidance"), width=520)

# %%
sets = {f"weight {weight:g}": np.asarray(guided.samples) for weight, guided in drawn.items()}
fixed = np.asarray(polish(model, jnp.asarray(unguided), sigma, num_steps=50))
sizes = np.unique(np.geomspace(1, count, 30).astype(int))
curves = [
    Curve(
        name, *rarefaction(find_copies(x, images).hits, count, sizes), dashed=name == "fixed points"
    )
    for name, x in {**sets, "fixed points": fixed}.items()
]
Image(render(draw_curves, curves), width=520)

# %% [markdown]
# Without training images SIDE has candidates as well: samples that crowd together within their
# cluster. They say less than attractors do.

# %%
guided = drawn[4.0]
ranked = rank_by_density(np.asarray(guided.samples), guided.label)
copies = find_copies(np.asarray(guided.samples)[ranked.row], images).is_copy
for first in (20, 50, 100):
    print(f"of the first {first:3}: {copies[:first].mean():.0%} are training images")

# %% [markdown]
# Which images come out: how often they stood in the training set decides it.

# %%
print("                     x16 of 64   x8 of 128   x1 of 808")
for name, samples in {"unguided": unguided, **sets, "fixed points": fixed}.items():
    hit = find_copies(samples, images).hits > 0
    print(f"{name:20} {hit[times == 16].sum():9} {hit[times == 8].sum():11}", end=" ")
    print(f"{hit[times == 1].sum():11}")

# %% [markdown]
# What stands there once comes out in no way: this model has not stored it. And nothing here passes
# for a copy of a held-out digit, which is how one knows that the rule counts copies, and not digits
# that look alike.
