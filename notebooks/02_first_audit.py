# %% [markdown]
# # A first audit: which digits has this model stored?
#
# `memjax audit digits` does this in one command and writes a report. Here is the same in Python,
# with a model whose training set we planted ourselves: of 1,000 handwritten digits, 16 stand
# twice in it, 16 four times, and so on up to 32 times; 797 digits are held out. The model is a
# small residual network, trained at the first run (about a minute on two cores) and cached.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np

import memjax as mj
from memjax.data import from_array
from memjax.training import graded_testbed

plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
testbed = graded_testbed(seed=0)
multiplicity = testbed.bed.multiplicity
images = from_array(testbed.bed.images, ids=testbed.bed.ids)
print(len(images), "images;", len(testbed.bed.train_indices), "training rows")

# %% [markdown]
# ## The audit
#
# Two lines: a model and images. Half of the held-out digits calibrate the flags, so a flag here
# means membership: *this image scores higher than unseen images do, at a false-discovery rate
# of ten percent*. The samples were drawn with the model; without them `mj.audit` draws its own.

# %%
calibration = mj.Calibration("membership", rows=np.flatnonzero(multiplicity == 0)[::2])
result = mj.audit(
    testbed.model,
    images,
    calibrations=[calibration],
    samples=testbed.samples,
    trained_on=multiplicity > 0,
)

print("rank  image       value  FLIPD  p-value  stored  copies   times in the training set")
line = (
    "{rank:4}  {id}  {p_laplace_flux_over_difficulty:5.3f}  {flipd_raw:5.1f}  "
    "{p_membership_p_laplace_flux_over_difficulty:7.4f}  {stored!s:6}  {copies:6}"
)
for row in result.top(8):
    print(line.format(**row), "{:8}".format(multiplicity[row["row"]]))

# %% [markdown]
# Rows are ranked by how nearly the score around an image points back at it, compared with images
# that are as hard: how hard each is, a Gaussian fitted to the others tells without any model. A
# value of 0.7 = log 2 is half as far from perfect memory as such images usually are. FLIPD is a
# local dimension: around the first digits the model leaves only six or seven of sixty-four
# directions free. All of them stand 32 times in the training set, and all are *stored* in the
# exact sense of the word: samples reproduce them.

# %%
gallery = result.gallery
figure, axes = plt.subplots(2, 10, figsize=(9.6, 2.3), layout="constrained")
for k in range(10):
    axes[0, k].imshow(gallery["images"][k, ..., 0], cmap="gray", vmin=-1, vmax=1)
    axes[1, k].imshow(gallery["nearest_samples"][k, ..., 0], cmap="gray", vmin=-1, vmax=1)
    axes[0, k].set_title(f"rank {k + 1}", fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("image")
axes[1, 0].set_ylabel("sample")
plt.show()

# %% [markdown]
# ## What the detectors see
#
# Every detector is oriented so that larger means more memorized, and evaluations that several
# need are made once: here at one noise level, 0.1 times the data's standard deviation.

# %%
groups = [0, 1, 2, 4, 8, 16, 32]
names = [entry["name"] for entry in result.manifest["detectors"]]
titles = [entry["title"] for entry in result.manifest["detectors"]]
figure, axes = plt.subplots(1, len(names), figsize=(9.6, 3.2), layout="constrained")
for axis, name, title in zip(axes, names, titles, strict=True):
    value = result.table.column(name).to_numpy()
    axis.boxplot(
        [value[multiplicity == m] for m in groups],
        tick_labels=[str(m) for m in groups],
        widths=0.6,
        flierprops={"markersize": 2, "alpha": 0.3},
        medianprops={"color": "#D55E00"},
    )
    axis.set_title(textwrap.fill(title, 18))
    axis.tick_params(labelsize=8)
axes[0].set_ylabel("value (larger = more memorized)")
figure.supxlabel("times in the training set; 0 is held out", fontsize=10)
plt.show()

# %% [markdown]
# The denoising loss and the score norm tell members from unseen digits; the effective dimension
# does not, but it rises with every repetition. FLIPD is the sum of both effects, and the flux
# through a small sphere around the image sees both best: compared with images as difficult, every
# doubling counts about alike.
#
# ## Flags and truth
#
# We know the truth, so we can count how many flags are right. The promise is about the expected
# share of false ones, at most ten percent.

# %%
flag = result.table.column("flag_membership_p_laplace_flux_over_difficulty")
flagged = np.array([each is True for each in flag.to_pylist()])
stored = np.array([row is True for row in result.table.column("stored").to_pylist()])
print("flagged:", flagged.sum(), " of these held out:", (flagged & (multiplicity == 0)).sum())
print("\ntimes   images   flagged   stored")
for m in groups[1:]:
    group = multiplicity == m
    print(f"{m:5} {group.sum():8} {(flagged & group).sum():9} {(stored & group).sum():8}")

# %% [markdown]
# Nearly all training digits are recognized as such, and yet almost none of those seen once or
# twice can be pulled out with 4,096 samples. *Membership*, *duplication* and *stored* are
# different findings, which is why memjax never uses one word for another.
