"""Extraction: draw samples in several ways, and say which of them may be stored images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax import __version__
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.hashing import fingerprint
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.auditing.parts import Parts
from memjax.auditing.rows import Progress
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import decode_samples, sample, widest_dtype
from memjax.extract.attractors import rank_attractors
from memjax.extract.fixed_points import FixedPoints, find_fixed_points
from memjax.training.testbeds import graded_testbed

Method = Literal["fixed-points", "side", "both"]
LEVEL = 0.125
"""Noise level of the fixed points in standard deviations of the data."""
NUM_STEPS = 200
EVALUATIONS = 35
"""Of one sample: Heun's rule in 18 steps."""
WIDE = (0, 0, 128, 64, 0)
"""Images that stand 2, 4, 8, 16 and 32 times in the test bed's training set."""
_CHUNKS = 8
"""Chunks that are computed before they are committed."""


class SampleSet(NamedTuple):
    """n samples drawn in one way.

    Attributes:
        weight: of the guidance; ``None`` for samples of the model alone.
        fixed: whether they were brought to fixed points of the denoiser.
        samples: in the space of the score, float32; NaN where it was not finite.
        label: the cluster that each was guided to.
        products: evaluations of the model, of all together.
        gradients: of the classifier, of all together.
    """

    weight: float | None
    fixed: bool
    samples: Float[np.ndarray, "n ..."]
    label: Int[np.ndarray, "n"] | None
    products: int
    gradients: int

    @property
    def name(self) -> str:
        """What they are, in words."""
        if self.weight is None:
            return "fixed points" if self.fixed else "unguided"
        return f"weight {self.weight:g}" + (", fixed points" if self.fixed else "")


class Candidates(NamedTuple):
    """What may be stored images, the most likely first, found without any training image.

    Attributes:
        points: in the space of the score.
        images: decoded.
        facts: what they are ranked by and more, one entry a candidate, by name.
    """

    points: Float[np.ndarray, "k ..."]
    images: Float[np.ndarray, "k ..."]
    facts: dict[str, np.ndarray]


class Extracted(NamedTuple):
    """Samples, and candidates among them.

    Attributes:
        plan: everything that determined them, as JSON-ready values.
        sets: samples in every way they were drawn, equally many.
        candidates: ranked.
        facts: what else is worth knowing, by name.
    """

    plan: dict[str, Any]
    sets: tuple[SampleSet, ...]
    candidates: Candidates
    facts: dict[str, Any]


def extract(
    model: Model,
    *,
    method: Method = "fixed-points",
    num_samples: int = 2048,
    level: float | None = None,
    num_steps: int = NUM_STEPS,
    chunk_size: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Draw samples, bring out what the model has stored, and rank candidates.

    Args:
        model: unguided; its null condition is used.
        method: ``"fixed-points"`` iterates samples through the denoiser until they stand still
            and ranks these attractors.
        num_samples: n.
        level: noise level of the fixed points in standard deviations of the data; ``None`` for
            ``LEVEL``, where the model has it.
        num_steps: of the iteration.
        chunk_size: samples computed together; ``None`` to choose by their size.
        seed: of every draw.
        out: folder in which finished blocks are kept, so that the same call goes on where an
            interrupted one stopped, until ``discard`` is told that they are no longer needed.
            ``None`` to keep everything in memory.
        progress: called with (stage, done, total).

    Returns:
        `Extracted`. The same arguments give the same bits, whether or not the work was
        interrupted and taken up again.

    Raises:
        InputError: an argument out of range, or ``out`` holds unfinished work with others.
    """
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if num_samples < 1:
        raise InputError(f"num_samples: expected at least 1, got {num_samples}")
    if not model.origin.assumed:
        fixed_point_sigma(model, level)
    size = int(np.prod(model.event_shape))
    chunk_size = chunk_size or int(np.clip(2**16 // size, 1, 128))
    plan = {
        "method": method,
        "samples": num_samples,
        "level": level,
        "steps": num_steps,
        "chunk_size": chunk_size,
        "seed": seed,
        "model": fingerprint(model),
        "data_std": model.data_std,
        "sigma_range": [model.sigma_min, model.sigma_max],
        "memjax": __version__,
        "jax": jax.__version__,
    }
    report = progress or (lambda stage, done, total: None)
    work = _Work(model, seed, chunk_size, _open(out, plan), report)
    drawn = work.draw("samples", num_samples)
    model = work.scaled(drawn)
    sigma = fixed_point_sigma(model, level)
    sets = [SampleSet(None, False, drawn, None, EVALUATIONS * num_samples, 0)]
    facts: dict[str, Any] = {"data_std": model.data_std}
    found = [work.settle(f"settled-{k}", each, sigma, num_steps) for k, each in enumerate(sets)]
    candidates = work.attract(found, sigma)
    for each, of in zip(tuple(sets), found, strict=True):
        products = each.products + int(np.sum(of.cost.forward))
        sets.append(each._replace(fixed=True, samples=np.asarray(of.points), products=products))
    status = np.concatenate([np.asarray(of.status) for of in found])
    facts |= {"sigma": sigma, "starts": len(status), "converged": int((status == Status.OK).sum())}
    return Extracted(plan, tuple(sets), candidates, facts)


def digits_extraction(seed: int, progress: Progress) -> dict[str, Any]:
    """The wide test bed: many images that are stored about equally well, and what they are.

    Args:
        seed: of the test bed and the training.
        progress: called while the model trains.

    Returns:
        ``model``; ``images``, the different training images, with their ``ids`` and how many
        ``times`` each stands in the training set; ``heldout``, images that do not.
    """
    bed, model, *_ = graded_testbed(seed, WIDE, num_samples=64, progress=progress)
    trained = np.flatnonzero(bed.multiplicity)
    return {
        "model": model,
        "images": bed.images[trained],
        "ids": tuple(bed.ids[row] for row in trained),
        "times": bed.multiplicity[trained],
        "heldout": bed.images[bed.multiplicity == 0],
    }


def discard(out: Path, plan: dict[str, Any]) -> None:
    """Remove the blocks that ``extract`` kept, once everything is written."""
    _open(out, plan).discard()


def fixed_point_sigma(model: Model, level: float | None) -> float:
    """The noise level of the fixed points in units of the score.

    Args:
        model: the model.
        level: in standard deviations of its data; ``None`` for ``LEVEL``, or what is nearest to
            it in the model's range.

    Raises:
        InputError: the model does not have this level.
    """
    low, high = (sigma / model.data_std for sigma in (model.sigma_min, model.sigma_max))
    if level is None:
        level = float(np.clip(LEVEL, low, high))
    if not low <= level <= high:
        raise InputError(f"level: expected a number from {low:.3g} to {high:.3g}, got {level:g}")
    return level * model.data_std


def _open(out: Path | None, plan: dict[str, Any]) -> Parts:
    return Parts(out, plan, "extraction")


class _Work:
    """The stages of an extraction, in blocks that are committed as they are done."""

    def __init__(self, model: Model, seed: int, chunk_size: int, parts: Parts, progress: Progress):
        self.model, self.seed, self.chunk_size = model, seed, chunk_size
        self.parts, self.progress = parts, progress

    def draw(self, stage: str, n: int) -> Float[np.ndarray, "n ..."]:
        """Samples of the model alone."""

        def block(rows: slice, report: Callable[[int, int], None]) -> dict[str, Any]:
            key = derive_key(self.seed, "extract", stage, rows.start)
            count = rows.stop - rows.start
            drawn = sample(self.model, count, key=key, chunk_size=self.chunk_size, progress=report)
            return {"samples": drawn}

        return self._blocks(stage, stage, n, block)["samples"]

    def scaled(self, drawn: Float[np.ndarray, "n ..."]) -> Model:
        """The model, from now on with a standard deviation of its data that was measured."""
        if self.model.origin.assumed:
            finite = np.isfinite(drawn.reshape(len(drawn), -1)).all(axis=1)
            if not finite.any():
                raise InputError("model: its samples are not finite")
            std = float(np.std(drawn[finite], dtype=np.float64))
            self.model = self.model.with_data_std(std, "measured on samples")
        return self.model

    def settle(self, stage: str, of: SampleSet, sigma: float, num_steps: int) -> FixedPoints:
        """Where the denoiser carries samples."""

        def block(rows: slice, report: Callable[[int, int], None]) -> dict[str, Any]:
            found = find_fixed_points(
                self.model,
                self._given(of.samples[rows]),
                sigma,
                num_steps=num_steps,
                chunk_size=self.chunk_size,
                progress=report,
            )
            return {**found._asdict(), "cost": found.cost.forward}

        title = "fixed points" if of.weight is None else f"fixed points of {of.name}"
        whole = self._blocks(stage, title, len(of.samples), block)
        none = np.zeros_like(whole["cost"])
        return FixedPoints(**{**whole, "cost": Cost(whole["cost"], none, none)})  # type: ignore[arg-type]

    def attract(self, found: Sequence[FixedPoints], sigma: float) -> Candidates:
        """The attractors of all that came to rest, ranked."""
        part = self.parts.read("attractors")
        if part is None:
            whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
            whole = whole._replace(points=self._given(whole.points))
            at = rank_attractors(
                self.model,
                whole,
                sigma,
                key=derive_key(self.seed, "extract", "attractors"),
                chunk_size=min(16, self.chunk_size),
                progress=lambda done, total: self.progress("attractors", done, total),
            )
            names = ("points", "hits", "radius", "stable", "residual", "status")
            part = {name: np.asarray(getattr(at, name)) for name in names}
            part["points"] = _plain(at.points)
            self.parts.write("attractors", part)
        points = part.pop("points")
        return Candidates(points, self.decode(points), part)

    def decode(self, points: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
        """Samples as images."""
        return decode_images(self.model, points)

    def _given(self, rows: Float[np.ndarray, "n ..."]) -> Float[Array, "n ..."]:
        return jnp.asarray(rows, widest_dtype(self.model))

    def _blocks(
        self,
        stage: str,
        title: str,
        n: int,
        block: Callable[[slice, Callable[[int, int], None]], dict[str, Any]],
    ) -> dict[str, np.ndarray]:
        """Arrays of n rows, computed some rows at a time or read from what was computed before."""
        size = _CHUNKS * self.chunk_size
        found = []
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            name = f"{stage}-{start:08d}"
            part = self.parts.read(name)
            if part is None:
                part = {
                    key: _plain(values)
                    for key, values in block(
                        rows, lambda done, _, start=start: self.progress(title, start + done, n)
                    ).items()
                }
                self.parts.write(name, part)
            else:
                self.progress(title, rows.stop, n)
            found.append(part)
        return {key: np.concatenate([part[key] for part in found]) for key in found[0]}


def decode_images(model: Model, points: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Samples as images, through the model's decoder; none stay none."""
    given = jnp.asarray(points, widest_dtype(model))
    if len(points):
        return np.asarray(decode_samples(model, given), np.float32)
    like = jax.ShapeDtypeStruct(model.event_shape, given.dtype)
    return np.zeros((0, *jax.eval_shape(model.decode, like).shape), np.float32)


def _plain(values: Any) -> np.ndarray:
    """What every reader of .npz files knows: floating-point numbers in single precision."""
    array = np.asarray(values)
    return array if array.dtype.kind in "biu" else np.asarray(array, np.float32)
