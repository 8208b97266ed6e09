# %% [markdown]
# # Which part of an image is stored?
#
# A model may know one half of a picture by heart and invent the other. The score says which:
# with noise of standard deviation $\sigma$ on an image, the diagonal of $I + \sigma^2 H$,
# $H = \partial s/\partial x$, is the share of each pixel's variance that is left once the noisy
# image is seen. 1 is a pixel that is free; 0 is one that is pinned. A pixel is pinned for many
# reasons (a black corner is black in all images), so what counts is a *difference*: against the
# same model without the condition, against a weaker checkpoint, or against the other prompts.
#
# `memjax localize digits` does all of this in one command. Here it is in Python, on a small model
# of 70 prompts whose training set we planted: twenty prompts have only one image ("stored"),
# twenty have forty different ones ("general"), and twenty "template" prompts have images whose top
# half is always the same and whose bottom half always another. The model and a weaker one are
# trained at the first run and cached.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Image

from memjax.evaluate import map_ranking, mask_overlap
from memjax.localize import fit_threshold, over_others, scan_images, scan_levels, smooth
from memjax.report import MapRow, draw_maps, render, thumbnail
from memjax.training import prompts_testbed

testbed = prompts_testbed(seed=0, num_samples=70)
weaker = prompts_testbed(seed=0, steps=1000, num_samples=70).model
bed, model = testbed.bed, testbed.model
kind = np.array(bed.kind)
print({name: int((kind == name).sum()) for name in ("memorized", "general", "template")})

# %% [markdown]
# ## Maps
#
# At images of each prompt with noise, no sampling is needed. All maps of one point come from one
# linearization, and for 64 pixels they are exact; what is averaged are eight noises, at five noise
# levels. Every map is without dimension, signed, and has a standard error.

# %%
rows = np.flatnonzero((kind == "template") | (kind == "general"))
images = bed.images.reshape(len(kind), -1, 8, 8, 1)[rows][:, ::5]  # eight of each prompt
sigmas = jnp.array([0.2, 0.35, 0.6, 1.0, 1.5]) * model.data_std
maps = scan_images(
    model,
    jnp.asarray(images),
    sigmas,
    jnp.asarray(rows, jnp.int32),
    key=jax.random.key(0),
    baseline=weaker,
    num_draws=8,
)
candidates = {
    "curvature over no prompt": maps.curvature_over_null,
    "curvature over a weaker checkpoint": maps.curvature_over_baseline,
    "curvature over the other prompts": over_others(maps.curvature),
}
print("network products an image:", int(maps.cost.total[0].sum()))

# %% [markdown]
# ## From maps to masks
#
# A map becomes one number a pixel by its mean over the logarithm of the noise level, smoothed a
# little. The threshold comes from every second prompt, and the numbers below from the other
# template prompts. About a sixth of the pixels hardly varies in the whole training set, so that
# nothing shows whether they are stored: the numbers count those that vary. The floor is the mask
# of all pixels.

# %%
template = np.flatnonzero(kind[rows] == "template")
general = np.flatnonzero(kind[rows] == "general")
learn, test = np.concatenate([template[::2], general[::2]]), template[1::2]
truth = bed.mask[rows][..., 0]
varying = np.broadcast_to(bed.images.std(0)[..., 0] > 0.05, truth.shape)
scan = jax.jit(jax.vmap(lambda of, base: scan_levels(sigmas, of, base).integral))
width = float(jnp.log(sigmas[-1] / sigmas[0]))

found = {}
print(f"{'':36} AUROC                IoU                  IoU, all pixels   floor")
for title, of in candidates.items():
    mean = np.asarray(scan(of, maps.curvature)) / width
    blurred = smooth(mean, 0.65)
    threshold = fit_threshold(blurred[learn], truth[learn], counted=varying[learn])
    mask = blurred > threshold
    area = map_ranking(blurred[test], truth[test], counted=varying[test]).auroc
    cover = mask_overlap(mask[test], truth[test], counted=varying[test]).iou
    everywhere = mask_overlap(mask[test], truth[test]).iou
    print(
        f"{title:36} {area.value:.3f} [{area.low:.3f}, {area.high:.3f}] "
        f"{cover.value:.3f} [{cover.low:.3f}, {cover.high:.3f}] {everywhere.value:12.3f} "
        f"{cover.all_ones:12.3f}"
    )
    found[title] = mean, mask

# %% [markdown]
# Neither the comparison with no prompt nor that with the other prompts needs a second model. The
# latter ranks the pixels of template prompts best, and supposes that a pixel means the same in all
# images, as in digits or faces; its mistakes elsewhere are counted below.
#
# In the pictures red is more pinned than under the other prompts, blue less, on one scale.

# %%
mean, mask = found["curvature over the other prompts"]
shown = [
    MapRow(
        f"{rows[i]} {kind[rows[i]]}",
        thumbnail(images[i, 0]),
        mean[i],
        mask[i],
        truth[i],
    )
    for i in (*test[:4], *general[:2])
]
Image(render(draw_maps, shown, "share of a pixel's variance lost here, not elsewhere"), width=480)

# %% [markdown]
# ## Mistakes
#
# The same threshold on the other general prompts, of which nothing is stored, says how often a
# pixel is called stored for nothing.

# %%
for title, (_, mask) in found.items():
    share = mask[general[1::2]][varying[general[1::2]]].mean()
    print(f"{title:36} {share:.3f} of the varying pixels of general prompts")
