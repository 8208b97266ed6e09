"""Training sets with planted duplicates: what a model may store is known exactly.

Both beds are cut from the bundled digits (`memjax.data.bundled.digits`). Every draw comes from a
NumPy generator named by (seed, purpose), so one purpose can change without moving the others.
"""

import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError
from memjax.data.bundled import digits

NUM_TRAINING = 1000
MULTIPLICITIES = (2, 4, 8, 16, 32)
ROWS_PER_PROMPT = 40
DOMINANT_ROWS = 36


class GradedBed(NamedTuple):
    """Digits of which some stand several times in the training set.

    Attributes:
        images: float32 [1797, 8, 8, 1] in [-1, 1], one row per distinct picture.
        ids: one name per row.
        labels: the digit 0..9 per row.
        split: "train" or "heldout" per row.
        multiplicity: how often the row stands in the training set; 0 for a held-out row.
        train_indices: the training set as row numbers, ascending, each repeated
            ``multiplicity`` times.
    """

    images: Float[np.ndarray, "n 8 8 1"]
    ids: tuple[str, ...]
    labels: Int[np.ndarray, "n"]
    split: tuple[str, ...]
    multiplicity: Int[np.ndarray, "n"]
    train_indices: Int[np.ndarray, "t"]

    @property
    def training_images(self) -> Float[np.ndarray, "t 8 8 1"]:
        """The training set with its repetitions, in the order of ``train_indices``."""
        return self.images[self.train_indices]


class PromptBed(NamedTuple):
    """Conditional training set of 70 prompts with 40 rows each, prompt after prompt.

    The kinds of prompt, in this order:

    - ``memorized`` (20): all 40 rows are one image.
    - ``general`` (20): 40 different images of one digit; every digit has two such prompts.
    - ``template`` (20): the top half is that of one image in all rows, the bottom halves come
      from 40 other images.
    - ``mitigation`` (10): one image fills the first 36 rows, four others the last four.

    No digit serves two prompts or two purposes.

    Attributes:
        images: float32 [2800, 8, 8, 1] in [-1, 1].
        prompt: prompt number 0..69 per row.
        kind: the kind of each prompt.
        mask: bool [70, 8, 8, 1], True where the prompt pins the pixel by construction:
            everywhere for memorized and mitigation (its one image), the top half for template,
            nowhere for general.
        digit_class: the digit a general prompt means, -1 for the other kinds.
        multiplicity: how often the row's image stands in the training set.
        source: numbers of the digits that the row's top and bottom half come from.
    """

    images: Float[np.ndarray, "r 8 8 1"]
    prompt: Int[np.ndarray, "r"]
    kind: tuple[str, ...]
    mask: Bool[np.ndarray, "p 8 8 1"]
    digit_class: Int[np.ndarray, "p"]
    multiplicity: Int[np.ndarray, "r"]
    source: Int[np.ndarray, "r 2"]


def graded(seed: int = 0, group_size: int | tuple[int, ...] = 16) -> GradedBed:
    """Draw the graded test bed: 1,000 training digits, some of them repeated, 797 held out.

    ``group_size`` images each stand 2, 4, 8, 16 and 32 times in the training set, the others
    once. Group size 16 gives 1,912 training rows.

    Args:
        seed: who is held out and who is repeated. At least 0.
        group_size: images per multiplicity, one number for all or five numbers >= 0, together
            1..1000. 16 makes the training short; (48, 48, 16, 16, 16) resolves finer detection
            rates at 2 and 4 repetitions and leaves the training set nearly as small, which is
            what makes a model memorize; (0, 0, 128, 64, 0) stores many images about equally
            well, so that it shows how many of them an extraction reaches.

    Returns:
        A `GradedBed`.

    Raises:
        InputError: ``seed`` or ``group_size`` out of range.

    Example:
        >>> from memjax.data.testbeds import graded
        >>> graded(seed=0).training_images.shape
        (1912, 8, 8, 1)
    """
    count = len(MULTIPLICITIES)
    sizes = group_size if isinstance(group_size, tuple) else (group_size,) * count
    if len(sizes) != count or min(sizes) < 0 or not 1 <= sum(sizes) <= NUM_TRAINING:
        raise InputError(
            f"group_size: expected 1..{NUM_TRAINING // count} images, or {count} numbers from 0 "
            f"that sum to 1..{NUM_TRAINING}, got {group_size}"
        )
    source = digits()
    order = _stream(seed, "graded").permutation(len(source))
    multiplicity = np.zeros(len(source), np.int32)
    multiplicity[order[:NUM_TRAINING]] = 1
    multiplicity[order[: sum(sizes)]] = np.repeat(MULTIPLICITIES, sizes)
    return GradedBed(
        images=source.images,
        ids=source.ids,
        labels=source.labels,
        split=tuple("train" if m else "heldout" for m in multiplicity),
        multiplicity=multiplicity,
        train_indices=np.repeat(np.arange(len(source), dtype=np.int32), multiplicity),
    )


def prompts(seed: int = 0) -> PromptBed:
    """Draw the conditional test bed: 70 prompts, of which 20 store an image and 20 a half.

    Args:
        seed: which digits serve which prompt. At least 0.

    Returns:
        A `PromptBed` of 2,800 rows.

    Raises:
        InputError: ``seed`` is negative.

    Example:
        >>> from memjax.data.testbeds import prompts
        >>> bed = prompts(seed=0)
        >>> bed.kind[45], bool(bed.mask[45, :4].all()), bool(bed.mask[45, 4:].any())
        ('template', True, False)
    """
    bank = digits()
    order = _stream(seed, "prompts").permutation(len(bank))
    kind = ("memorized",) * 20 + ("general",) * 20 + ("template",) * 20 + ("mitigation",) * 10
    digit_class = np.full(len(kind), -1, np.int32)
    mask = np.ones((len(kind), 8, 8, 1), bool)
    source = np.empty((len(kind), ROWS_PER_PROMPT, 2), np.int32)

    # General prompts choose first, from their digit; the others share what is left.
    general = [p for p, k in enumerate(kind) if k == "general"]
    for rank, p in enumerate(general):
        digit_class[p] = rank % 10
        mask[p] = False
        of_class = order[bank.labels[order] == digit_class[p]]
        start = (rank // 10) * ROWS_PER_PROMPT
        source[p] = of_class[start : start + ROWS_PER_PROMPT, None]
    rest = iter(order[~np.isin(order, source[general])].tolist())

    for p, k in enumerate(kind):
        if k == "memorized":
            source[p] = next(rest)
        elif k == "template":
            mask[p, 4:] = False
            source[p, :, 0] = next(rest)
            source[p, :, 1] = [next(rest) for _ in range(ROWS_PER_PROMPT)]
        elif k == "mitigation":
            source[p, :DOMINANT_ROWS] = next(rest)
            for row in range(DOMINANT_ROWS, ROWS_PER_PROMPT):
                source[p, row] = next(rest)

    source = source.reshape(-1, 2)
    images = np.concatenate([bank.images[source[:, 0], :4], bank.images[source[:, 1], 4:]], axis=1)
    _, inverse, count = np.unique(source, axis=0, return_inverse=True, return_counts=True)
    return PromptBed(
        images=images,
        prompt=np.repeat(np.arange(len(kind), dtype=np.int32), ROWS_PER_PROMPT),
        kind=kind,
        mask=mask,
        digit_class=digit_class,
        multiplicity=count[inverse].astype(np.int32),
        source=source,
    )


def _stream(seed: int, purpose: str) -> np.random.Generator:
    """The generator for one purpose under one seed."""
    if seed < 0:
        raise InputError(f"seed: expected an integer of at least 0, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
