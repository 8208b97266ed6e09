"""Spectral density of a symmetric operator: stochastic Lanczos quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import finite_status
from memjax.linalg._krylov import check_krylov, length, orthogonalize, product_noise
from memjax.linalg._operator import Matvec
from memjax.linalg.estimate import Estimate
from memjax.linalg.probes import sphere


class SpectralDensity(NamedTuple):
    """Gauss rules of a symmetric operator A, one for each random probe v.

    ``sum_j weights[i, j] f(nodes[i, j])`` is the Gauss rule for ``v_i^T f(A) v_i``, which is
    ``tr f(A)`` on average over probes. It is exact for polynomials f of degree up to
    2 num_steps - 1; so the moments up to there, and everything where ``exact``, carry the error of
    the probes alone, which the estimates below report. For other f the error of the rule comes on
    top and is not in the standard error: at most 2 |v|^2 times the distance of f, in the maximum
    norm on the interval of the spectrum, from the polynomials of that degree.

    The methods are for one operator; over a batch, ``vmap`` them.

    Attributes:
        nodes: Ritz values, ascending; a rule that needs fewer repeats its largest with weight zero.
        weights: not negative; those of one probe sum to |v|^2 (d for all probes but Gaussian ones).
        exact: the Krylov space of the probe closed: its rule is exact for every f.
        status: ``OK``, or ``NONFINITE`` if a product was not finite; the nodes and weights of that
            probe are NaN, and so is every estimate.
        num_products: products with A that the rules needed.
    """

    nodes: Float[Array, "m steps"]
    weights: Float[Array, "m steps"]
    exact: Bool[Array, " m"]
    status: Int[Array, ""]
    num_products: Int[Array, ""]

    def trace(self, f: Callable[[Float[Array, "m steps"]], Array]) -> Estimate:
        """Estimate ``tr f(A) = sum_i f(lambda_i)``.

        Args:
            f: elementwise function of the eigenvalue, traceable. It must be finite on the
                interval of the spectrum: log, powers or inverses of an operator with nodes at or
                below zero give ``NONFINITE``.

        Returns:
            ``Estimate`` with num_probes - 1 degrees of freedom; the standard error is the spread
            across probes (too wide for orthonormal probes, which are not independent).

        >>> import jax, jax.numpy as jnp
        >>> a = jnp.array([1.0, 2.0, 3.0])
        >>> density = spectral_density(lambda v: a * v, jnp.zeros(3), jax.random.key(0), 20, 2)
        >>> cubes = density.trace(lambda x: x**3)
        >>> bool(abs(cubes.value - 36) < 4 * cubes.standard_error)
        True
        """
        return self._estimate(self.weights * jnp.asarray(f(self.nodes), self.weights.dtype))

    def count_above(self, tau: float | int | Float[Array, ""]) -> Estimate:
        """Estimate the number of eigenvalues above tau: ``trace`` of a step.

        A Gauss rule resolves a step only to the distance of its nodes. In a gap of the spectrum it
        soon is as good as exact; with tau inside a cluster or a continuum about the weight of a
        node there may be counted on the wrong side. ``count_bias`` bounds that error, which is not
        in the standard error. An eigenvalue within rounding of tau may fall on either side.

        Args:
            tau: threshold.

        Returns:
            ``Estimate``, not rounded to a whole number.
        """
        return self._estimate(jnp.where(self.nodes > tau, self.weights, self._outside()))

    def count_below(self, tau: float | int | Float[Array, ""]) -> Estimate:
        """Estimate the number of eigenvalues below tau; see ``count_above``.

        Args:
            tau: threshold.

        Returns:
            ``Estimate``, not rounded to a whole number.
        """
        return self._estimate(jnp.where(self.nodes < tau, self.weights, self._outside()))

    def count_bias(self, tau: float | int | Float[Array, ""]) -> Float[Array, ""]:
        """Bound the error that the rules, not the probes, make in the counts at tau.

        A Gauss rule and the measure it stands for share their moments, and two such measures
        differ on either side of tau by at most ``rho(tau) = 1/sum_k p_k(tau)^2``, with p_k the
        orthonormal polynomials of degree k < num_steps (Chebyshev, Markov, Stieltjes). From the
        rule itself, ``1/rho(tau) = sum_j l_j(tau)^2/w_j`` with the Lagrange polynomials l_j of its
        nodes. It is the weight of the node at a node, falls geometrically in num_steps in a gap,
        and is zero where ``exact``.

        Args:
            tau: threshold.

        Returns:
            A number of eigenvalues, the mean over the probes, to be read beside the standard error
            of the count. It holds for these probes, whatever the spectrum, up to rounding.

        References:
            Akhiezer (1965), The Classical Moment Problem, section 2.5 (the inequalities).
        """

        def rule(nodes, weights, exact):
            eps = jnp.finfo(nodes.dtype).eps
            others = ~jnp.eye(nodes.size, dtype=bool)
            apart = jnp.abs(nodes[:, None] - nodes[None, :])
            # Both floors, on what rounding leaves of a distance and of a weight, widen the bound.
            apart = jnp.maximum(apart, eps * jnp.max(jnp.abs(nodes)))
            there = jnp.log(jnp.abs(nodes - tau))[None, :]
            log_basis = jnp.sum(jnp.where(others, there - jnp.log(apart), 0), axis=1)
            log_weights = jnp.log(weights + eps**2 * jnp.sum(weights))
            bound = jnp.exp(-jax.nn.logsumexp(2 * log_basis - log_weights))
            return jnp.where(exact, jnp.zeros_like(bound), bound)

        return jnp.mean(jax.vmap(rule)(self.nodes, self.weights, self.exact))

    def density(
        self, points: Float[Array, " p"], width: float | int | Float[Array, ""]
    ) -> Estimate:
        """Estimate the smoothed spectral density, in eigenvalues per unit of eigenvalue.

        ``phi(t) = sum_i N(t; lambda_i, width^2)``, the trace of a Gaussian of A, which integrates
        to d (divide by d for a probability density).

        Args:
            points: where; any number of values t.
            width: standard deviation of the Gaussian, > 0. Below the distance of the nodes the
                estimate shows the nodes instead of the spectrum.

        Returns:
            ``Estimate`` for every point.

        References:
            Lin, Saad and Yang (2016), Approximating spectral densities of large matrices,
            arXiv:1308.5467.
        """

        def at(t):
            z = (self.nodes - t) / width
            return self.weights * jnp.exp(-0.5 * z**2) / (width * (2 * jnp.pi) ** 0.5)

        return self._estimate(jax.vmap(at)(points))

    def _outside(self) -> Float[Array, "... m steps"]:
        """Zero, or NaN where the rule failed (which comparisons would hide)."""
        return 0 * self.weights

    def _estimate(self, terms: Float[Array, "... m steps"]) -> Estimate:
        """Sum over the nodes, mean over the probes and its standard error."""
        if self.nodes.ndim != 2:
            shape = list(self.nodes.shape)
            raise InputError(f"nodes: expected [m, steps] (vmap the method), got shape {shape}")
        values = jnp.sum(terms, axis=-1)
        num_probes = values.shape[-1]
        return Estimate(
            value=jnp.mean(values, axis=-1),
            standard_error=jnp.std(values, axis=-1, ddof=1) / num_probes**0.5,
            degrees_of_freedom=jnp.int32(num_probes - 1),
            status=finite_status(values),
            num_products=self.num_products,
        )


class _State(NamedTuple):
    """A V^T = V^T T + remainder v e_n^T with V the first n = size rows of the basis, v the next.

    Each step ends by writing its vector: XLA would copy a basis that is read after it was written.
    """

    basis: Float[Array, "steps+1 d"]
    diagonal: Float[Array, " steps"]
    off_diagonal: Float[Array, " steps"]
    vector: Float[Array, " d"]
    norm: Float[Array, ""]
    size: Int[Array, ""]
    closed: Bool[Array, ""]


def spectral_density(
    matvec: Matvec,
    like: Float[Array, "..."],
    key: PRNGKeyArray,
    num_probes: int,
    num_steps: int,
    *,
    probes: Callable[[PRNGKeyArray, int, Array], Float[Array, "m ..."]] = sphere,
    chunk_size: int | None = 16,
) -> SpectralDensity:
    """Distribution of the eigenvalues of a symmetric operator by stochastic Lanczos quadrature.

    ``num_steps`` Lanczos steps from a probe v, with full (twice) reorthogonalization, give
    ``T = V A V^T``; its eigenvalues theta_j and the first entries z_1j of its eigenvectors are the
    nodes and ``|v|^2 z_1j^2`` the weights of the Gauss rule for ``v^T f(A) v``, and
    ``E v^T f(A) v = tr f(A)``. One call serves every f: traces, counts, the smoothed density.

    A remainder of the size of rounding means that the Krylov space has closed; the rule is exact
    with the nodes it has. Low-rank operators, the identity and zero are ordinary input.

    Args:
        matvec: v -> A v on arrays of one shape (any rank), A symmetric, traceable.
        like: an array of that shape and dtype (float32 or float64); its values are not used.
        key: for the probes.
        num_probes: independent rules, 2 or more. Static.
        num_steps: products per probe at most, 1 or more; at most d are used. Static.
        probes: ``sphere``, ``rademacher``, ``gaussian`` or ``orthonormal``. On the sphere the
            error depends on the eigenvalues alone, and is zero for a multiple of the identity.
            With ``orthonormal``, d probes and d steps every estimate is exact.
        chunk_size: probes run together; memory is chunk_size * num_steps vectors.

    Returns:
        ``SpectralDensity``.

    Raises:
        InputError: ``like`` is not float32 or float64, A v differs from v in shape or dtype, or a
            size is out of range.

    Without raising: a NaN or infinite product gives NaN and ``NONFINITE``. Of a matrix that is not
    symmetric the result means nothing: symmetrize first.

    Accuracy and cost: standard errors fall as 1/sqrt(num_probes); for f(x) = x on the sphere the
    variance of one probe is ``2 d/(d+2) (|A|_F^2 - (tr A)^2/d)``. ``num_probes * num_steps``
    products, and per probe about 4 num_steps^2 d operations. No reverse-mode derivative.

    >>> import jax, jax.numpy as jnp
    >>> a = jnp.array([1.0, 1.0, 5.0, 5.0, 5.0])
    >>> density = spectral_density(lambda v: a * v, jnp.zeros(5), jax.random.key(0), 50, 3)
    >>> above = density.count_above(2.0)
    >>> bool(abs(above.value - 3) < 4 * above.standard_error), bool(density.exact.all())
    (True, True)

    References:
        Ubaru, Chen and Saad (2017), doi:10.1137/16M1104974, sections 3 and 4. Lin, Saad and Yang
        (2016), arXiv:1308.5467. Golub and Meurant (2010), Matrices, Moments and Quadrature with
        Applications, doi:10.1515/9781400833889, chapter 6.
    """
    check_krylov(matvec, like)
    check_count("num_probes", num_probes, 2)
    check_count("num_steps", num_steps, 1)
    steps, noise = min(num_steps, like.size), product_noise(like)

    def step(state: _State) -> _State:
        return _expand(state, matvec(state.vector.reshape(like.shape)).reshape(-1), noise)

    def rule(probe):
        size = length(probe.reshape(-1))
        state = jax.lax.while_loop(
            lambda s: ~s.closed & (s.size < steps), step, _initial(probe.reshape(-1) / size, steps)
        )
        return *_gauss(state, size**2), state.closed, state.size

    vectors = probes(derive_key(key, "probes"), num_probes, like)
    if vectors.shape != (num_probes, *like.shape) or vectors.dtype != like.dtype:
        expected = f"{like.dtype}{[num_probes, *like.shape]}"
        raise InputError(f"probes: expected {expected}, got {vectors.dtype}{list(vectors.shape)}")
    nodes, weights, closed, sizes = chunked_map(rule, vectors, chunk_size=chunk_size)
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        exact=closed & jnp.all(jnp.isfinite(nodes), axis=-1),
        status=finite_status(nodes),
        num_products=jnp.sum(sizes, dtype=jnp.int32),
    )


def _initial(vector: Float[Array, " d"], steps: int) -> _State:
    """A basis of one vector, not yet multiplied."""
    dtype = vector.dtype
    return _State(
        basis=jnp.zeros((steps + 1, vector.size), dtype).at[0].set(vector),
        diagonal=jnp.zeros(steps, dtype),
        off_diagonal=jnp.zeros(steps, dtype),
        vector=vector,
        norm=jnp.zeros((), dtype),
        size=jnp.int32(0),
        closed=jnp.asarray(False),
    )


def _expand(state: _State, w: Float[Array, " d"], noise: float) -> _State:
    """Take the product w of the vector into T, and its remainder into the basis."""
    n = state.size
    rest, column = orthogonalize(state.basis, w)
    norm = jnp.maximum(state.norm, length(w))
    remainder = length(rest)
    # Negated, so that a NaN closes it too. With the whole space in the basis nothing is left.
    closed = ~(remainder > noise * norm) | (n + 1 == w.size)
    vector = rest / jnp.where(closed, jnp.ones_like(remainder), remainder)
    return _State(
        basis=jax.lax.dynamic_update_index_in_dim(state.basis, vector, n + 1, 0),
        diagonal=state.diagonal.at[n].set(column[n]),
        off_diagonal=state.off_diagonal.at[n].set(jnp.where(closed, 0, remainder)),
        vector=vector,
        norm=norm,
        size=n + 1,
        closed=closed,
    )


def _gauss(
    state: _State, total: Float[Array, ""]
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Nodes and weights of the rule that T stands for; the weights sum to ``total``."""
    steps = state.diagonal.size
    finite = jnp.isfinite(state.norm)
    used = jnp.arange(steps, dtype=jnp.int32) < state.size
    diagonal = jnp.where(finite, state.diagonal, 0)
    off_diagonal = jnp.where(finite, state.off_diagonal, 0)[:-1]
    top = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(jnp.abs(off_diagonal), initial=0))
    unit = jnp.where(top > 0, top, jnp.ones_like(top))
    # Gershgorin: |T| <= 3 max |T_ij|. Empty slots are decoupled, and sort behind the spectrum.
    tridiagonal = (
        jnp.diag(jnp.where(used, diagonal / unit, 4))
        + jnp.diag(off_diagonal / unit, 1)
        + jnp.diag(off_diagonal / unit, -1)
    )
    values, vectors = jnp.linalg.eigh(tridiagonal, symmetrize_input=False)
    nodes = unit * jnp.where(used, values, values[state.size - 1])
    weights = total * jnp.where(used, vectors[0] ** 2, 0)
    nan = jnp.asarray(jnp.nan, nodes.dtype)
    return jnp.where(finite, nodes, nan), jnp.where(finite, weights, nan)
