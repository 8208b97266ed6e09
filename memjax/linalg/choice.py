"""A diagonal estimate that looks first and chooses its method itself."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.status import Status
from memjax.linalg._krylov import product_noise
from memjax.linalg._leave_one_out import diagonal_leave_one_out
from memjax.linalg._operator import Matvec, check_matvec
from memjax.linalg._products import apply_rows, diagonal_estimate, exact_diagonal, normalized
from memjax.linalg.diagonal import mean_of_forms, nystrom_leave_one_out, range_of, signs
from memjax.linalg.estimate import Estimate
from memjax.linalg.lattice import (
    decay,
    error_energy,
    image_axes,
    lattice_energies,
    lattice_estimate,
    lattice_probes,
    lattice_rounds,
)


class DiagonalMethod(enum.IntEnum):
    """How ``diagonal_auto`` spent its products."""

    EXACT = 0
    """``diagonal_exact``: there were as many products as entries."""
    LATTICE = 1
    """``diagonal_lattice``: entries fade with distance, or nothing is to be gained elsewhere."""
    HUTCHINSON = 2
    """``diagonal_hutchinson``: far entries are larger than near ones."""
    XDIAG = 3
    """``diagonal_xdiag``: the spectrum decays."""
    XNYSDIAG = 4
    """``diagonal_xnysdiag``: the spectrum decays and A is positive semi-definite."""

    @property
    def label(self) -> str:
        """Lower-case name, as written into tables."""
        return self.name.lower()


class DiagonalChoice(NamedTuple):
    """An estimate and the method that made it.

    Attributes:
        estimate: as the chosen method returns it.
        method: a ``DiagonalMethod``.
    """

    estimate: Estimate
    method: Int[Array, ""]


# The pilot is at most this long: it must cost little, and show decay over a few octaves.
_MAX_PILOT = 16
# A rank prediction is hopeful (a spectrum extrapolated), the lattice's is cautious.
_RANK_MARGIN = 0.1
# Without spatial decay lattice and independent signs tie; only a clear loss counts.
_HUTCHINSON_MARGIN = 0.5


def diagonal_auto(
    matvec: Matvec,
    like: Float[Array, "..."],
    key: PRNGKeyArray,
    num_products: int,
    *,
    spatial_axes: tuple[int, ...] | None = None,
    channel_colors: bool = True,
    rmatvec: Matvec | None = None,
    positive: bool = False,
    chunk_size: int | None = 16,
) -> DiagonalChoice:
    """Diagonal of A by whichever estimator a few first products recommend.

    The first p = min(m/4, 16) of the m products (a power of two) are those of a lattice round.
    They predict the mean square error of each method at the full budget: for the lattice, and for
    independent signs, from the energies of the color classes (``diagonal_lattice``) carried on by
    their decay; for XDiag (k = m // 2) and XNysDiag (k = m) from the part of a product that the
    p - 1 others do not explain, ``rho``, as ``rho^(k/(p - 1))`` of the energy per remaining probe.
    No pilot product is lost: the lattice continues its round, and the bases of XDiag and XNysDiag
    contain the pilot (they average over the other probes only). Only random signs start anew.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), traceable.
        like: an array of that shape and dtype; its values are not used.
        key: source of randomness.
        num_products: m >= 1. From d on the diagonal is exact; below 8 it is the lattice's. Static.
        spatial_axes: axes along which distance is measured; ``None`` for the first two, or the
            only one. Static.
        channel_colors: as in ``diagonal_lattice``. Static.
        rmatvec: v -> A^T v; ``None`` for symmetric A. If given, half of the products are made with
            it whatever the choice (A and its transpose share the diagonal), and the lattice is two
            of half the size.
        positive: whether A is symmetric positive semi-definite, so that XNysDiag may be chosen
            (instead of XDiag). Static.
        chunk_size: products evaluated together.

    Returns:
        The estimate and the ``DiagonalMethod``.

    Raises:
        InputError: ``num_products`` < 1; A v is not like v; bad axes.

    The choice depends on the operator, key by key, and so is random where methods are close.

    Cost: exactly ``min(m, d)`` products, also under ``vmap`` when rows choose differently: only
    probes and the algebra that follows are selected.

    >>> import jax, jax.numpy as jnp
    >>> blur = lambda v: v + 0.5 * (jnp.roll(v, 1) + jnp.roll(v, -1))
    >>> out = diagonal_auto(blur, jnp.zeros(64), jax.random.key(0), 16)
    >>> DiagonalMethod(int(out.method)).label, bool(jnp.allclose(out.estimate.value, 1.0))
    ('lattice', True)
    """
    check_count("num_products", num_products, 1)
    check_matvec(matvec, like)
    axes = image_axes(like, spatial_axes)
    m, d, half = num_products, like.size, num_products // 2
    if m >= d:
        estimate = exact_diagonal(matvec, like, chunk_size)
        return DiagonalChoice(estimate, jnp.int32(DiagonalMethod.EXACT))

    key_lattice, key_other, key_signs = jax.random.split(key, 3)
    random = signs(key_signs, m, like)
    example = random[0].reshape(like.shape)

    def lattice_rows(key, num):
        rows = lattice_probes(key, num, example, spatial_axes=axes, channel_colors=channel_colors)
        return rows.reshape(num, d), lattice_rounds(num, like, axes)

    if rmatvec is None or m < 8:
        lattice, rounds = lattice_rows(key_lattice, m)
    else:
        one, rounds_one = lattice_rows(key_lattice, half)
        two, rounds_two = lattice_rows(key_other, m - half)
        lattice, rounds = jnp.concatenate([one, two]), rounds_one + rounds_two

    def lattice_result(products):
        value, error, freedom = lattice_estimate(
            lattice * products, rounds, like, axes, channel_colors
        )
        return value, error, jnp.int32(freedom), jnp.int32(Status.OK)

    if m < 8:
        products = apply_rows(matvec, lattice, like, chunk_size)
        scaled, unit = normalized(products)
        value, error, freedom, status = lattice_result(scaled)
        estimate = diagonal_estimate(like, unit * value, unit * error, freedom, m, products, status)
        return DiagonalChoice(estimate, jnp.int32(DiagonalMethod.LATTICE))

    pilot = min(1 << (m // 4).bit_length() - 1, _MAX_PILOT)
    first = apply_rows(matvec, lattice[:pilot], like, chunk_size)
    method = _choose(lattice[:pilot], normalized(first)[0], rounds[0], m, positive)

    use_lattice = method == DiagonalMethod.LATTICE
    second = apply_rows(
        matvec, jnp.where(use_lattice, lattice[pilot:half], random[pilot:half]), like, chunk_size
    )
    forward = jnp.concatenate([first, second])
    mixed = jnp.concatenate([lattice[:pilot], random[pilot:]])

    def basis_rows():
        scaled, unit = normalized(forward)
        basis, directions, lengths = range_of(scaled, product_noise(mixed[0]))
        return jnp.pad(basis, ((0, m - 2 * half), (0, 0))), directions, unit * lengths

    def no_basis(rows):
        return rows, jnp.zeros((half, half), rows.dtype), jnp.zeros(half, rows.dtype)

    rows, directions, lengths = jax.lax.cond(
        method == DiagonalMethod.XDIAG,
        basis_rows,
        lambda: no_basis(jnp.where(use_lattice, lattice[half:], random[half:])),
    )
    third = apply_rows(matvec if rmatvec is None else rmatvec, rows, like, chunk_size)
    products = jnp.concatenate([forward, third])
    scaled, unit = normalized(products)

    def hutchinson_result():
        value, error = mean_of_forms(random[pilot:] * scaled[pilot:])
        return value, error, jnp.int32(m - pilot - 1), jnp.int32(Status.OK)

    def xdiag_result():
        value, error = diagonal_leave_one_out(
            rows[:half],
            scaled[half : 2 * half],
            directions[pilot:],
            lengths[pilot:] / unit,
            mixed[pilot:half],
        )
        return value, error, jnp.int32(half - pilot - 1), jnp.int32(Status.OK)

    def xnysdiag_result():
        value, error, status = nystrom_leave_one_out(mixed, scaled, pilot)
        return value, error, jnp.int32(m - pilot - 1), status

    branches = [lambda: lattice_result(scaled), hutchinson_result, xdiag_result]
    if positive:
        branches.append(xnysdiag_result)
    value, error, freedom, status = jax.lax.switch(method - DiagonalMethod.LATTICE, branches)
    estimate = diagonal_estimate(like, unit * value, unit * error, freedom, m, products, status)
    return DiagonalChoice(estimate, method)


def _choose(
    probes: Float[Array, "p d"],
    products: Float[Array, "p d"],
    colors: int,
    m: int,
    positive: bool,
) -> Int[Array, ""]:
    """The method of the smallest predicted mean square error; ties go to the lattice."""
    p, d = probes.shape
    energies, off_diagonal = lattice_energies(probes * products)
    unresolved = error_energy(energies, d)
    levels_left = colors.bit_length() - p.bit_length()
    lattice = unresolved * (decay(energies) / 2) ** levels_left / (m // colors)
    hutchinson = (off_diagonal + unresolved) / m

    _, _, lengths = range_of(products, product_noise(probes[0]))
    energy = jnp.sum(products**2, axis=1)
    rho = jnp.mean(jnp.where(energy > 0, lengths**2 / jnp.where(energy > 0, energy, 1), 0))
    rank = m if positive else m // 2
    low_rank = rho ** (rank / (p - 1)) * jnp.mean(energy) / d / (rank - p)

    best = jnp.where(
        hutchinson < _HUTCHINSON_MARGIN * lattice,
        jnp.int32(DiagonalMethod.HUTCHINSON),
        jnp.int32(DiagonalMethod.LATTICE),
    )
    by_rank = DiagonalMethod.XNYSDIAG if positive else DiagonalMethod.XDIAG
    wins = low_rank < _RANK_MARGIN * jnp.minimum(lattice, hutchinson)
    return jnp.where(wins, jnp.int32(by_rank), best)
