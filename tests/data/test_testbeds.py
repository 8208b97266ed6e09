import re
import zlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from memjax._core.errors import InputError
from memjax.data.bundled import digits
from memjax.data.testbeds import graded, prompts

GRADED_CRC = 4202331888
PROMPTS_CRC = 1271614057


def rows_of(images):
    """Each image as a hashable value."""
    return [image.tobytes() for image in images]


def test_digits_are_scikit_learns():
    bank = digits()
    pixels, target = load_digits(return_X_y=True)
    assert bank.images.shape == (1797, 8, 8, 1)
    assert bank.images.dtype == np.float32
    np.testing.assert_array_equal((bank.images[..., 0] + 1) * 8, pixels.reshape(-1, 8, 8))
    np.testing.assert_array_equal(bank.labels, target)
    assert (bank.images.min(), bank.images.max()) == (-1, 1)
    assert bank.ids[:2] == ("digit-0000", "digit-0001")
    assert bank.ok.all()
    assert bank.event_shape == (8, 8, 1)


def test_digits_are_distinct():
    bank = digits()
    assert len(set(bank.sha256)) == len(set(bank.ids)) == len(bank) == 1797


@pytest.mark.parametrize(
    ("group_size", "rows"),
    [
        *((16, 1912), (48, 3736), (1, 1057), (200, 12400)),
        *(((48, 48, 16, 16, 16), 2040), ((0, 0, 128, 64, 0), 2856)),
        *(((48, 48, 0, 0, 0), 1192), ((0, 0, 0, 0, 1000), 32000)),
    ],
)
def test_graded_counts(group_size, rows):
    bed = graded(0, group_size)
    values, counts = np.unique(bed.multiplicity, return_counts=True)
    sizes = (group_size,) * 5 if isinstance(group_size, int) else group_size
    expected = {0: 797, 1: 1000 - sum(sizes)} | dict(zip((2, 4, 8, 16, 32), sizes, strict=True))
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
        k: v for k, v in expected.items() if v
    }
    assert bed.training_images.shape == (rows, 8, 8, 1)
    # Multiplicity, split and training set tell the same story.
    np.testing.assert_array_equal(np.bincount(bed.train_indices, minlength=1797), bed.multiplicity)
    assert [s == "train" for s in bed.split] == (bed.multiplicity > 0).tolist()


def test_graded_truth_holds_pixel_by_pixel():
    # Counted from the pixels alone: how often each picture stands in the training set.
    bed = graded(3)
    training = rows_of(bed.training_images)
    for image, count in zip(rows_of(bed.images)[:200], bed.multiplicity, strict=False):
        assert training.count(image) == count


def test_seed_redraws_roles_and_nothing_else():
    one, again, other = graded(1), graded(1), graded(2)
    for left, right in zip(one, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (one.multiplicity != other.multiplicity).mean() > 0.3
    np.testing.assert_array_equal(one.images, other.images)
    # The larger group size keeps who is held out.
    np.testing.assert_array_equal(one.multiplicity == 0, graded(1, 48).multiplicity == 0)


def test_draws_do_not_change_between_versions():
    # Results on the test beds are quoted by seed.
    assert zlib.crc32(graded(0).multiplicity.astype("<i4").tobytes()) == GRADED_CRC
    assert zlib.crc32(prompts(0).source.astype("<i4").tobytes()) == PROMPTS_CRC


@pytest.mark.parametrize(
    "group_size",
    [0, 201, -1, (48, 48), (0, 0, 0, 0, 0), (1001, 0, 0, 0, 0), (48, -1, 0, 0, 0)],
)
def test_group_size_out_of_range(group_size):
    expected = "1..200 images, or 5 numbers from 0 that sum to 1..1000"
    with pytest.raises(InputError, match=re.escape(f"expected {expected}, got {group_size}")):
        graded(0, group_size)


@pytest.mark.parametrize("bed", [graded, prompts])
def test_negative_seed(bed):
    with pytest.raises(InputError, match="seed: expected an integer of at least 0, got -1"):
        bed(-1)


@pytest.fixture(scope="module", params=[0, 1])
def bed(request):
    return prompts(request.param)


def rows(bed, kind):
    """Images [prompts, 40, 8, 8, 1] of one kind."""
    chosen = [p for p, k in enumerate(bed.kind) if k == kind]
    return np.stack([bed.images[bed.prompt == p] for p in chosen]), chosen


def test_prompt_counts(bed):
    assert bed.images.shape == (2800, 8, 8, 1)
    assert bed.images.dtype == np.float32
    assert [bed.kind.count(k) for k in ("memorized", "general", "template", "mitigation")] == [
        20,
        20,
        20,
        10,
    ]
    np.testing.assert_array_equal(np.bincount(bed.prompt), np.full(70, 40))


def test_memorized_prompts_mean_one_image(bed):
    images, chosen = rows(bed, "memorized")
    assert (images == images[:, :1]).all()
    assert len(set(rows_of(images[:, 0]))) == 20
    assert bed.mask[chosen].all()


def test_general_prompts_mean_a_digit(bed):
    images, chosen = rows(bed, "general")
    assert sorted(bed.digit_class[chosen].tolist()) == sorted(list(range(10)) * 2)
    bank = digits()
    label = dict(zip(rows_of(bank.images), bank.labels.tolist(), strict=True))
    for prompt, group in zip(chosen, images, strict=True):
        assert {label[row] for row in rows_of(group)} == {bed.digit_class[prompt]}
        assert len(set(rows_of(group))) == 40
    assert not bed.mask[chosen].any()
    assert (np.delete(bed.digit_class, chosen) == -1).all()


def test_template_prompts_fix_exactly_the_masked_half(bed):
    images, chosen = rows(bed, "template")
    mask = bed.mask[chosen]
    assert mask[:, :4].all()
    assert not mask[:, 4:].any()
    for group in images:
        assert (group[:, :4] == group[0, :4]).all()
        assert len(set(rows_of(group[:, 4:]))) == 40


def test_mitigation_prompts_have_one_dominant_image(bed):
    images, chosen = rows(bed, "mitigation")
    for group in images:
        assert (group[:36] == group[0]).all()
        assert len(set(rows_of(group))) == 5
    assert bed.mask[chosen].all()


def test_multiplicity_counts_rows(bed):
    all_rows = rows_of(bed.images)
    count = {row: all_rows.count(row) for row in set(all_rows)}
    assert [count[row] for row in all_rows] == bed.multiplicity.tolist()
    assert set(bed.multiplicity.tolist()) == {1, 36, 40}


def test_no_digit_serves_two_prompts(bed):
    used = {}
    for prompt, pair in zip(bed.prompt.tolist(), bed.source.tolist(), strict=True):
        for digit in pair:
            assert used.setdefault(digit, prompt) == prompt
    bank = digits().images
    np.testing.assert_array_equal(bed.images[:, :4], bank[bed.source[:, 0], :4])
    np.testing.assert_array_equal(bed.images[:, 4:], bank[bed.source[:, 1], 4:])
