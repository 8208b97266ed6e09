"""The stages of an extraction: each is computed in blocks, and every block is kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax._core.checks import check_count
from memjax._core.cost import Cost
from memjax._core.errors import CheckpointError, InputError
from memjax._core.hashing import fingerprint
from memjax._core.keys import derive_key
from memjax.auditing.parts import Parts
from memjax.auditing.rows import Progress
from memjax.checkpoints.classifier import load_classifier, save_classifier
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import decode_samples, sample, widest_dtype
from memjax.extract.attractors import rank_attractors
from memjax.extract.fixed_points import DENSE_SIZE, FixedPoints, find_fixed_points
from memjax.extract.guidance import guided_samples
from memjax.extract.surrogate import (
    SurrogateLabels,
    posterior_classifier,
    surrogate_labels,
)
from memjax.training.classifier import ClassifierReport, TrainedClassifier, train_classifier

CLASSIFIERS = ("mlp", "resnet", "posterior")
CLASSIFIER = "classifier"
"""Folder beside the results that holds SIDE's classifier."""
_CHUNKS = 8
"""Chunks that are computed before they are committed."""


class Side(NamedTuple):
    """How samples are guided by surrogate labels.

    Attributes:
        weights: of the guidance, the paper's lambda, at least 0; at 0 there is none.
        pool: samples that are clustered, and that the classifier learns from.
        clusters: K.
        min_cohesion: clusters with a smaller mean cosine to their center are dropped.
        keep: share of the clusters that is kept at most.
        features: what is clustered: ``"pixels"``, ``"latents"`` (samples in the space of the
            score), or a function of images [n, ...] that gives rows of numbers.
        classifier: its network, ``"mlp"`` or ``"resnet"``, or ``"posterior"`` for the exact
            classifier of the pool, which needs no training; ``None`` for ``"mlp"`` up to
            ``DENSE_SIZE`` numbers a sample, else ``"resnet"``.
        steps: of its training.
        window: noise levels between which samples are guided, in standard deviations of the data.
        limit: bound of the push relative to the score.
        normalize: push in units of the score.
    """

    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    pool: int = 4096
    clusters: int = 100
    min_cohesion: float = 0.5
    keep: float = 1.0
    features: str | Callable[[np.ndarray], np.ndarray] = "pixels"
    classifier: str | None = None
    steps: int = 4000
    window: tuple[float, float] | None = None
    limit: float | None = None
    normalize: bool = False

    def check(self) -> None:
        """Refuse what cannot be done, before anything is computed.

        Raises:
            InputError: a field out of range.
        """
        weights, window = self.weights, self.window
        if not weights or len(set(weights)) < len(weights) or not all(w >= 0 for w in weights):
            shown = ", ".join(f"{weight:g}" for weight in weights)
            raise InputError(f"weights: expected different numbers of at least 0, got {shown}")
        check_count("clusters", self.clusters, 2)
        if self.pool < self.clusters:
            raise InputError(f"pool: expected at least {self.clusters} (clusters), got {self.pool}")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep: expected 0 < keep <= 1, got {self.keep}")
        if self.classifier not in (None, *CLASSIFIERS):
            names = ", ".join(CLASSIFIERS)
            raise InputError(f"classifier: expected one of {names}, got {self.classifier!r}")
        check_count("steps", self.steps, 1)
        if window is not None and not 0 <= window[0] < window[1]:
            raise InputError(f"window: expected 0 <= low < high, got {window[0]:g}, {window[1]:g}")
        if self.limit is not None and not self.limit > 0:
            raise InputError(f"limit: expected a positive number, got {self.limit}")
        if isinstance(self.features, str) and self.features not in ("pixels", "latents"):
            raise InputError(f"features: expected 'pixels' or 'latents', got {self.features!r}")

    def record(self) -> dict[str, Any]:
        """The fields, as JSON-ready values; a function by its name."""
        features = self.features
        if not isinstance(features, str):
            features = getattr(features, "__qualname__", type(features).__qualname__)
        return {**self._asdict(), "features": features}


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
        return f"weight {self.weight:g}" + (", fixed" if self.fixed else "")


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


class Stages:
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

    def scale(self, drawn: Float[np.ndarray, "n ..."]) -> None:
        """From samples, measure the standard deviation of the data if that is not known."""
        if self.model.origin.assumed:
            finite = np.isfinite(drawn.reshape(len(drawn), -1)).all(axis=1)
            if not finite.any():
                raise InputError("model: its samples are not finite")
            std = float(np.std(drawn[finite], dtype=np.float64))
            self.model = self.model.with_data_std(std, "measured on samples")

    def cluster(self, pool: Float[np.ndarray, "n ..."], side: Side) -> SurrogateLabels:
        """Surrogate labels of the pool."""
        part = self.parts.read("clusters")
        if part is None:
            found = surrogate_labels(
                self.features(pool, side),
                side.clusters,
                min_cohesion=side.min_cohesion,
                keep=side.keep,
                seed=self.seed,
            )
            part = found._asdict()
            self.parts.write("clusters", part)
        self.progress("clusters", side.clusters, side.clusters)
        return SurrogateLabels(**part)

    def features(
        self, samples: Float[np.ndarray, "n ..."], side: Side
    ) -> Float[np.ndarray, "n ..."]:
        """What samples are compared by."""
        if side.features == "latents":
            return samples
        images = self.decode(samples)
        return np.asarray(side.features(images)) if callable(side.features) else images

    def classify(
        self, pool: Float[np.ndarray, "n ..."], clusters: SurrogateLabels, side: Side
    ) -> tuple[Callable[..., Array], ClassifierReport | None]:
        """Log p(c | x, sigma), and how good it is where it was trained."""
        if side.classifier == "posterior":
            return posterior_classifier(pool, clusters.labels).log_class_prob, None
        return self._train(pool, clusters, side)

    def _train(
        self, pool: Float[np.ndarray, "n ..."], clusters: SurrogateLabels, side: Side
    ) -> TrainedClassifier:
        """The classifier of noised samples, trained on the pool or read from the folder."""
        path = None if self.parts.folder is None else self.parts.folder.parent / CLASSIFIER
        part = self.parts.read("classifier")
        if part is not None and path is not None:
            kept = str(part.pop("sha256"))
            try:
                classifier = load_classifier(path)
            except CheckpointError:
                classifier = None
            if classifier is not None and fingerprint(classifier) == kept:
                return TrainedClassifier(classifier, ClassifierReport(**part))
        size = int(np.prod(self.model.event_shape))
        usable = clusters.labels >= 0
        found = train_classifier(
            pool[usable],
            clusters.labels[usable],
            network=side.classifier or ("mlp" if size <= DENSE_SIZE else "resnet"),  # type: ignore[arg-type]
            num_classes=len(clusters.size),
            steps=side.steps,
            data_std=self.model.data_std,
            seed=self.seed,
            progress=lambda step, total, loss: self.progress("classifier", step, total),
        )
        if path is not None:
            save_classifier(found.classifier, path)
            written = {**found.report._asdict(), "sha256": np.array(fingerprint(found.classifier))}
            self.parts.write("classifier", written)
        return found

    def guide(
        self,
        stage: str,
        side: Side,
        log_prob: Callable[..., Array],
        num_clusters: int,
        weight: float,
        n: int,
    ) -> SampleSet:
        """Guided samples of one weight; noises and clusters are those of every other one."""
        window = None
        if side.window is not None:
            window = (side.window[0] * self.model.data_std, side.window[1] * self.model.data_std)

        def block(rows: slice, report: Callable[[int, int], None]) -> dict[str, Any]:
            found = guided_samples(
                self.model,
                log_prob,
                rows.stop - rows.start,
                weight,
                num_clusters=num_clusters,
                key=derive_key(self.seed, "extract", "guided", rows.start),
                window=window,
                limit=side.limit,
                normalize=side.normalize,
                chunk_size=self.chunk_size,
                progress=report,
            )
            counts = np.array([[int(found.cost.total), found.num_gradients]])
            return {"samples": found.samples, "label": found.label, "counts": counts}

        whole = self._blocks(stage, f"weight {weight:g}", n, block)
        products, gradients = whole["counts"].sum(axis=0).tolist()
        gradients *= weight > 0
        return SampleSet(weight, False, whole["samples"], whole["label"], products, gradients)

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
