# %% [markdown]
# # Operators: spectra, traces, diagonals and p-Laplacians without a matrix
#
# The Jacobian of a score at an image of d pixels is a d by d matrix that nobody wants to hold.
# memjax only ever multiplies with it: `linearize` evaluates the network once, each product then
# costs about as much as an evaluation, and everything below is made of products. Every estimate
# says how sure it is.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import memjax as mj
from memjax.linalg import DiagonalMethod
from memjax.training import graded_testbed

plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.titlesize": 10})
RED = "#CC3311"

# %% [markdown]
# ## The spectrum at a stored digit
#
# A small model of 8 by 8 digits, some of which stand 32 times in its training set. At noise sigma
# the operator M = I + sigma² H, with H the Hessian of the log-density, says how much of a
# perturbation the denoiser keeps: eigenvalue 0 means pinned, 1 means free. A learned score is no
# exact gradient, so its Jacobian is not symmetric; `asymmetry` says by how much, and the
# eigen-solver gets the symmetric part.

# %%
testbed = graded_testbed(seed=0)
multiplicity = testbed.bed.multiplicity
sigma = 0.1 * float(testbed.model.data_std)
rows = [int(np.flatnonzero(multiplicity == m)[0]) for m in (32, 1)]
images = jnp.asarray(testbed.bed.images[rows])


@jax.jit
def spectra(model, x, key):
    lin = mj.linearize(mj.at(model, sigma), x)
    retained = lambda v: v + sigma**2 * lin.symmetric(v)
    extreme = mj.eigsh(retained, x, key, 4, which="both")
    density = mj.spectral_density(retained, x, key, num_probes=16, num_steps=16)
    dense = lin.jacobian()
    everything = jnp.linalg.eigvalsh(jnp.eye(x.size) + sigma**2 * (dense + dense.T) / 2)
    return extreme, density.count_above(0.5), mj.asymmetry(lin, key, 16), everything


results = [spectra(testbed.model, x, jax.random.key(0)) for x in images]

figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.6), width_ratios=(1, 2.6, 1, 2.6))
for k, (extreme, above, asymmetry, everything) in enumerate(results):
    picture, plot = axes[2 * k], axes[2 * k + 1]
    picture.imshow(images[k, ..., 0], cmap="gray", vmin=-1, vmax=1)
    picture.set(xticks=[], yticks=[], title=f"stands {multiplicity[rows[k]]} times")
    plot.plot(np.sort(everything), "o", ms=3, color="0.6", label="all 64, from the matrix")
    at = [0, 1, 62, 63]
    plot.errorbar(
        at, extreme.values, extreme.residuals, fmt="x", color=RED, label="eigsh, both ends"
    )
    plot.axhline(0, color="0.85", lw=1, zorder=0)
    plot.axhline(1, color="0.85", lw=1, zorder=0)
    plot.set(ylim=(-0.35, 1.5), xlabel="eigenvalue number", title="eigenvalues of M")
    used = int(extreme.num_products)
    print(
        f"stands {multiplicity[rows[k]]:2} times: eigsh needed {used} products; "
        f"{above.value:.1f} +- {above.standard_error:.1f} eigenvalues above 1/2 "
        f"(exactly {int((everything > 0.5).sum())}); asymmetry {asymmetry.value:.3f}"
    )
axes[1].legend(fontsize=8, loc="upper left", frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# The digit stored 32 times is pinned in nearly every direction. The count of eigenvalues above one
# half comes from stochastic Lanczos quadrature, which never computes an eigenvalue of M itself.
#
# ## A map from sixteen products
#
# Which *pixels* are pinned? That is the diagonal of M. Here is a world where it is known: a smooth
# Gaussian field of 24 by 24 pixels, of which a disc is stored (variance 1/1000). Neighboring pixels
# are correlated, so plain Hutchinson probing is noisy; lattice probing gives nearby pixels
# different colors and lets only distant ones interfere.

# %%
size, length = 24, 2.5
row, column = np.mgrid[:size, :size].reshape(2, -1)
distance = np.hypot(row[:, None] - row, column[:, None] - column)
smooth = np.exp(-0.5 * (distance / length) ** 2)
disc = np.hypot(row - 11.5, column - 11.5) < 6
inside = np.where(disc, np.sqrt(1e-3), 1.0)
stored = mj.Gaussian(
    jnp.zeros((size, size)), jnp.asarray(smooth * np.outer(inside, inside) + 1e-6 * np.eye(size**2))
)
x, noise = jnp.zeros((size, size)), 0.05
lin = mj.linearize(mj.at(stored, noise), x)
retained = lambda v: v + noise**2 * lin.jvp(v)
exact = mj.diagonal_exact(retained, x)
key = jax.random.key(1)
maps = {
    "Hutchinson": mj.diagonal_hutchinson(retained, x, key, 16),
    "lattice": mj.diagonal_lattice(retained, x, key, 16),
}

figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
axes[0].imshow(exact, vmin=0, vmax=1, cmap="viridis")
axes[0].set_title("retained variance, exact\n(576 products)")
for axis, (name, estimate) in zip(axes[1:], maps.items(), strict=False):
    shown = axis.imshow(estimate.value, vmin=0, vmax=1, cmap="viridis")
    error = jnp.linalg.norm(estimate.value - exact) / jnp.linalg.norm(exact)
    axis.set_title(f"{name}, 16 products\nrelative error {error:.2f}")
figure.colorbar(shown, ax=axes[:3], shrink=0.8)
shown = axes[3].imshow(maps["lattice"].standard_error, cmap="viridis", vmin=0)
axes[3].set_title("standard error\nof the lattice map")
figure.colorbar(shown, ax=axes[3], shrink=0.8)
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# `diagonal_auto` spends a few products to find out which method suits the operator, and says what
# it chose.

# %%
for products in (16, 64):
    choice = mj.diagonal_auto(retained, x, key, products)
    error = jnp.linalg.norm(choice.estimate.value - exact) / jnp.linalg.norm(exact)
    method = DiagonalMethod(int(choice.method)).label
    print(f"{products} products: {method}, relative error {error:.3f}")

# %% [markdown]
# ## How many directions are free? Four estimators of a trace
#
# The trace of M is the effective dimension. XTrace and XNysTrace use every product twice, once to
# find where the operator lives and once to estimate the rest, and win where the spectrum decays.

# %%
methods = {
    "Hutchinson": mj.trace_hutchinson,
    "Hutch++": mj.trace_hutchpp,
    "XTrace": mj.trace_xtrace,
    "XNysTrace": mj.trace_xnystrace,
}
true = float(mj.trace_exact(retained, x))
print(f"effective dimension, exact: {true:.3f}")
for name, trace in methods.items():
    for products in (32, 256):
        estimate = trace(retained, x, key, products)
        low, high = estimate.interval()
        print(
            f"{name:10} {products:4} products: {estimate.value:8.3f} +- "
            f"{estimate.standard_error:7.3f}   95 % in [{low:.2f}, {high:.2f}]"
        )

# %% [markdown]
# ## p-Laplacians: one evaluation pattern, every exponent
#
# Brokman et al. find stored images as attractors of the score: places into which it flows from all
# sides. Their toy is a mixture of three Gaussians on a triangle. The exact p-Laplacian comes from
# products; the flux through a sphere comes from evaluations of the score alone.

# %%
angles = np.pi / 2 + np.arange(3) * 2 * np.pi / 3
corners = 5 / np.sqrt(3) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
triangle = mj.GaussianMixture(
    weights=jnp.ones(3) / 3, means=jnp.asarray(corners), covariances=jnp.full(3, 0.1)
)
field = mj.at(triangle, 0.0)
points = jnp.asarray(
    np.concatenate([corners, (corners + np.roll(corners, 1, axis=0)) / 2, np.zeros((1, 2))])
).astype(jnp.result_type(float))
flux = mj.p_laplacian_flux(field, 1, radius=1.0, num_pairs=4000, scaled=False)
estimate = jax.jit(jax.vmap(flux))(points, jax.random.split(jax.random.key(0), 7))
expected = [-1.0] * 3 + [0.3723] * 3 + [0.6888]
names = ["mode"] * 3 + ["midpoint"] * 3 + ["centroid"]
print("mean cosine on a circle of radius 1      estimate           exact")
for name, value, error, truth in zip(
    names, estimate.value, estimate.standard_error, expected, strict=True
):
    print(f"{name:36} {value:8.4f} +- {error:6.4f}  {truth:8.4f}")

# %%
axis = np.linspace(-5, 5, 121)
grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1)).astype(points.dtype)
exponents = (1, 1.5, 2, 3)
broad = mj.at(triangle, 1.0)  # at noise 1 the basins have soft edges
every = jax.jit(jax.vmap(jax.vmap(mj.p_laplacian(broad, exponents, normalized=True))))(grid)
figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
for k, (p, panel) in enumerate(zip(exponents, axes, strict=True)):
    shown = panel.pcolormesh(axis, axis, every[..., k], cmap="RdBu", vmin=-2, vmax=2)
    panel.plot(*corners.T, "k.", ms=4)
    panel.set(title=f"p = {p}", aspect="equal", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, shrink=0.8, label="normalized p-Laplacian")
plt.show()

# %% [markdown]
# Red basins are attractors. All exponents came from one linearization of each point: p = 1 sees
# only how the level sets curve, larger p more and more of how the density falls off.
