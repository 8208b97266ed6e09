# %% [markdown]
# # Copies: what stops them without training again, and what training again would do
#
# A prompt that copies can still be asked, if the sampler starts from a noise that does not fall
# into the stored image. SAIL looks for such noises; the other way is to move the prompt's
# embedding (Wen et al.). Both leave the weights alone. `memjax mitigate digits` does this in one
# command; here it is in Python.
#
# The model knows 70 prompts. Of ten of them one image fills 36 of 40 training rows and four other
# images the rest ("mixed"): other pictures are possible. Twenty have one image only ("stored"). The
# model is trained at the first run and cached.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Image

from memjax.diffusion import sample
from memjax.evaluate import find_copies
from memjax.mitigate import (
    NoiseObjective,
    embed_conditions,
    judge_noises,
    mitigate_data,
    optimize_prompts,
    sail,
)
from memjax.report import SampleRow, draw_samples, render, thumbnail
from memjax.training import prompts_testbed

testbed = prompts_testbed(seed=0, num_samples=70)
bed, model = testbed.bed, testbed.model
kind = np.array(bed.kind)
mixed, stored = np.flatnonzero(kind == "mitigation"), np.flatnonzero(kind == "memorized")[:5]
prompts = jnp.asarray(np.concatenate([mixed, stored]), jnp.int32)
count, each = len(prompts), 16


def draw(model, conditions, noises):
    flat = noises.reshape(-1, 8, 8, 1)
    conditions = jnp.repeat(conditions, each, axis=0)
    drawn = np.asarray(sample(model, len(flat), noises=flat, conditions=conditions))
    copies = find_copies(drawn, bed.images).is_copy
    return drawn.reshape(count, each, 8, 8, 1), copies.reshape(count, each)


random = jax.random.normal(jax.random.key(0), (count, each, 8, 8, 1))
before, copied = draw(model, prompts, random)
print(
    f"copies before: {copied[:10].mean():.2f} of mixed prompts, {copied[10:].mean():.2f} of stored"
)

# %% [markdown]
# ## Noises from which the prompt pulls less
#
# The objective is how much of the prompt's mean image the denoiser draws from a noise: about 1
# for a random one. A threshold is a share of its median over random noises of the same prompt.
# Each noise moves along the gradient just as far as it takes, on the sphere on which it was drawn.

# %%
objective = NoiseObjective("pull", sigma=2.5 * model.data_std)
scale = np.median(judge_noises(model, random, prompts, objective), axis=1)
print("share   accepted        copies          moved |n - n0|   products a prompt")
print("        mixed stored    mixed stored    mixed stored")
for share in (0.9, 0.8, 0.7, 0.6):
    found = sail(
        model, each, key=1, conditions=prompts, threshold=share * scale, objective=objective
    )
    after, copies = draw(model, prompts, found.noises)
    numbers = [
        np.asarray(values)[rows].mean()
        for values in (found.accepted, copies, found.moved)
        for rows in (slice(0, 10), slice(10, None))
    ]
    products = float(np.mean(sum(np.asarray(part) for part in found.cost)))
    print(
        "{:5.1f}  {:6.2f} {:6.2f}   {:6.2f} {:6.2f}   {:6.1f} {:6.1f}".format(share, *numbers),
        f"{products:16.0f}",
    )
    if share == 0.7:
        chosen = after, copies, np.asarray(found.accepted)

# %% [markdown]
# A random noise has length 8. Mixed prompts need a short way; stored ones a long one, and not every
# noise arrives. What comes out then is in the picture, samples that copy a training image framed.
# For a prompt that only ever meant one image there is nothing else to draw, and a sample that is no
# copy by the rule is a damaged copy.

# %%
after, copies, accepted = chosen
names = [f"{p} {'mixed' if i < 10 else 'stored'}" for i, p in enumerate(np.asarray(prompts))]
rows = [
    SampleRow(
        names[i],
        [thumbnail(image) for image in before[i, :6]],
        [thumbnail(image) for image in after[i, :6]],
        (copied[i, :6].tolist(), copies[i, :6].tolist()),
    )
    for i in (0, 1, 2, 3, 4, 5, 10, 11, 12)
]
Image(render(draw_samples, rows, "a copy of a training image"), width=520)

# %% [markdown]
# ## Another embedding
#
# The prompt's vector moves until the gap between the scores with and without it is small at the
# first step. All noises of the prompt are helped at once, and what the prompt asks for fades with
# the gap.

# %%
changed, vectors = embed_conditions(model, prompts)
start = optimize_prompts(changed, key=0, conditions=vectors, target=1.0, num_steps=0).before
for share in (0.8, 0.6, 0.4):
    target = share * float(jnp.median(start))
    found = optimize_prompts(changed, key=0, conditions=vectors, target=target, num_steps=60)
    _, copies = draw(changed, found.conditions, random)
    print(
        f"gap to {share:.1f} of what it was: {copies[:10].mean():.2f} copies of mixed prompts, "
        f"{copies[10:].mean():.2f} of stored; at most {int(found.steps.max())} steps"
    )

# %% [markdown]
# ## The training set
#
# Noises and embeddings help whoever draws samples. An owner can instead drop, de-duplicate or
# augment the images that an audit ranks first, and train again: `mitigate_data` does so, and
# compares with the same change at random. It takes a function that trains; `retrain` is ours, and
# takes minutes. Here a stand-in "generates" the rows that it is given more than four times, which
# shows the bookkeeping and says nothing of a model.

# %%
from memjax.data import graded
from memjax.mitigate.data import Fitted

graded_bed = graded(0)


def stand_in(rows):
    distinct, times = np.unique(rows.reshape(len(rows), -1), axis=0, return_counts=True)
    return Fitted(distinct[times > 4].reshape(-1, 8, 8, 1), heldout_loss=float("nan"))


result = mitigate_data(
    graded_bed.images,
    graded_bed.multiplicity,
    graded_bed.multiplicity.astype(float),  # an audit's column; here the truth itself
    stand_in,
    num_images=32,
)
for name, outcome in (
    ("before", result.before),
    ("after", result.after),
    ("random", *result.random),
):
    print(f"{name:7} {outcome.rows:5} rows, {outcome.copied:3} images that the stand-in repeats")
