"""Leave-one-out over the probes of a low-rank approximation: what each probe alone contributed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.linalg._krylov import matmul


def dual_vectors(
    right: Float[Array, "m r"], scale: Float[Array, " r"], noise: float
) -> tuple[Float[Array, "m r"], Float[Array, " m"]]:
    """What is lost by leaving out one column of R = U diag(scale) V^T.

    Without column i, the span of R loses one direction, s_i: the unit vector of the span that is
    orthogonal to all other columns, a normalized column of the pseudo-inverse's transpose. If
    column i depends on the others nothing is lost and s_i = 0. It does so unless e_i lies in the
    row space, ``P_ii = 1`` with ``P = R^+ R``. Column i is then its s_i-component plus a
    combination of others, so no division by a small number enters.

    Args:
        right: V; columns of scale zero may be anything.
        scale: singular values, of any order.
        noise: singular values up to ``noise`` times the largest count as zero.

    Returns:
        The s_i as rows, in the basis of U; and the lengths ``s_i^T R e_i >= 0``.
    """
    kept = scale > noise * jnp.max(scale)
    right = jnp.where(kept[None, :], right, 0)
    inverse = right / jnp.where(kept, scale, 1)[None, :]
    size = jnp.linalg.norm(inverse, axis=1)
    dependence = 1 - jnp.sum(right**2, axis=1)
    # A null vector n of R says column i = -(sum_j n_j column_j)/n_i up to noise/n_i; its
    # component n_i^2 is `dependence`. Where that is small, column i is independent but for noise.
    lost = (dependence < float(jnp.finfo(scale.dtype).eps) ** 0.5) & (size > 0)
    size = jnp.where(lost, size, 1)
    return (
        jnp.where(lost[:, None], inverse / size[:, None], 0),
        jnp.where(lost, 1 / size, 0),
    )


def diagonal_leave_one_out(
    basis: Float[Array, "r d"],
    cobasis: Float[Array, "r d"],
    directions: Float[Array, "m r"],
    lengths: Float[Array, " m"],
    probes: Float[Array, "m d"],
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean over probes of (diagonal of the approximation without it + its own residual).

    With ``B = basis^T cobasis`` the approximation from all probes, q_i and z_i the combinations
    ``s_i`` of both and g_i the lengths, probe w_i alone gives

        x_i = diag(B) - q_i z_i + g_i w_i q_i,

    unbiased because w_i is independent of the approximation without it. The x_i are correlated:
    ``Cov[x_i, x_j] = E[D_ij D_ji]`` per entry, where D_ij is x_i less what it would be if probe j
    were left out too (both have the same mean given all probes but i, and the latter does not
    depend on j). Hence, without bias, ``Var[mean] = s^2/m + mean_(i != j) D_ij D_ji`` with s^2
    the sample variance of the x_i. For A near the identity the second term equals the first.

    Args:
        basis: rows that span the approximation's range.
        cobasis: rows with ``A ~ basis^T cobasis``.
        directions: s_i of the probes averaged over, from ``dual_vectors``.
        lengths: g_i of the same probes.
        probes: w_i, random signs, of the same probes.

    Returns:
        Mean and standard error, per entry. One probe has no spread: an infinite error, or zero
        if the probe's product depends on those of others.
    """
    m = probes.shape[0]
    q, z = matmul(directions, basis), matmul(directions, cobasis)
    g = lengths[:, None]
    x = q * (g * probes - z)
    value = jnp.sum(basis * cobasis, axis=0) + jnp.mean(x, axis=0)
    if m == 1:
        return value, jnp.where(lengths > 0, jnp.full_like(value, jnp.inf), jnp.zeros_like(value))

    cosines = matmul(directions, directions.T)
    apart = jnp.logical_not(jnp.eye(m, dtype=bool)) & (g > 0) & (g.T > 0)
    apart &= 1 - cosines**2 > jnp.finfo(cosines.dtype).eps
    cosines = jnp.where(apart, cosines, 0)

    def add_pairs(total, row):
        (q_i, z_i, w_i), g_i, c, use = [part[None] for part in row[:3]], *row[3:]
        c, sine = c[:, None], 1 - c[:, None] ** 2
        d_ij = (q - c * q_i) * (z - c * z_i + c * g_i * w_i)
        d_ji = (q_i - c * q) * (z_i - c * z + c * g * probes)
        return total + jnp.sum(jnp.where(use[:, None], d_ij * d_ji / sine**2, 0), axis=0), None

    rows = (q, z, probes, lengths, cosines, apart)
    total, _ = jax.lax.scan(add_pairs, jnp.zeros_like(value), rows)
    own = jnp.var(x, axis=0, ddof=1) / m
    return value, jnp.sqrt(own + jnp.maximum(total / (m * (m - 1)), 0))
