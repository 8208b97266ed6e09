"""Models and their conditions, as the user names them on the command line."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memjax._core.errors import InputError
from memjax._core.text import one_line
from memjax.cli.app import messages

_MAX_PROMPT_BYTES = 2**24


def load_model(path: str) -> Any:
    """Load a saved model; what it warns of is one line on standard error.

    Args:
        path: the folder.

    Returns:
        The model.
    """
    from memjax.checkpoints.loading import load

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load(path)
    for warning in caught:
        line = f"memjax: warning: {one_line(str(warning.message))}"
        messages.print(line, markup=False, soft_wrap=True)
    return model


def image_shape(model: Any, name: str) -> tuple[int, int, int]:
    """Shape of the images that a model takes: of pixels, or of what its latents decode to.

    Args:
        model: the model.
        name: its folder, for the message.

    Returns:
        Height, width and channels.

    Raises:
        InputError: its samples are no images.
    """
    import jax

    latent = jax.ShapeDtypeStruct(model.event_shape, "float32")
    shape = jax.eval_shape(model.decode, latent).shape
    if len(shape) != 3:
        raise InputError(f"{name}: expected a model of images, found {shape}")
    return shape


def read_conditions(path: str | None, n: int, model: Any, model_dir: str) -> Any:
    """Read the conditions of n images: numbers of classes, or prompts.

    Args:
        path: ``.npy`` of whole numbers, or ``.txt`` with a prompt on every line; None for none.
        n: how many there must be.
        model: what they are for.
        model_dir: its folder, with the text encoder.

    Returns:
        Conditions with a leading axis of n, or None.

    Raises:
        InputError: they do not fit the model or their number.
    """
    if path is None:
        return None
    if Path(path).suffix.lower() != ".txt":
        from memjax.data._array_file import read_array

        found = read_array(Path(path))
        if found.dtype.kind not in "iu" or found.shape != (n,):
            raise InputError(
                f"{path}: expected {n} whole numbers, one per image, found {found.dtype}"
                f"{list(found.shape)}"
            )
        return as_labels(found, model, path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_PROMPT_BYTES + 1)
        if len(data) > _MAX_PROMPT_BYTES:
            raise ValueError(f"more than {_MAX_PROMPT_BYTES} bytes")
        prompts = data.decode().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected text, found: {one_line(str(error))}") from None
    if len(prompts) != n:
        raise InputError(f"{path}: expected {n} lines, one prompt per image, found {len(prompts)}")
    return encode_prompts(prompts, model, model_dir, path)


def as_labels(found: Any, model: Any, what: str) -> Any:
    """Numbers of classes, once the model knows them all.

    Args:
        found: NumPy array of whole numbers.
        model: what they are for.
        what: the option or file they come from.

    Returns:
        int32 array.

    Raises:
        InputError: the model has no classes, or not so many.
    """
    import numpy as np

    null, network = model.null_condition, getattr(model.raw_score, "network", None)
    classes = getattr(getattr(network, "options", None), "num_class_embeds", None)
    if null is not None and getattr(null, "ndim", None) != 0:
        raise InputError(f"{what}: expected prompts for this model, got numbers")
    if null is not None:  # in our own models the number after the last class stands for none
        last, meaning = int(null), " (none)"
    elif classes is not None:
        last, meaning = classes - 1, ""
    else:
        raise InputError(f"{what}: the model takes no conditions")
    if found.min() < 0 or found.max() > last:
        raise InputError(
            f"{what}: expected conditions from 0 to {last}{meaning}, found {found.min()} to "
            f"{found.max()}"
        )
    return found.astype(np.int32)


def encode_prompts(prompts: Sequence[str], model: Any, model_dir: str, what: str) -> Any:
    """Prompts as conditions, through the text encoders in the model's folder.

    Args:
        prompts: at least one.
        model: what they are for.
        model_dir: its folder.
        what: the option or file they come from.

    Returns:
        Conditions with a leading axis.

    Raises:
        InputError: the model takes no prompts.
    """
    from memjax.checkpoints.prompts import load_prompts
    from memjax.networks.unet2d_condition import TextCondition

    if not isinstance(model.null_condition, TextCondition):
        raise InputError(f"{what}: the model takes no prompts")
    distinct = list(dict.fromkeys(prompts))
    import jax
    import numpy as np

    encoded = load_prompts(model_dir)(distinct)
    rows = np.array([distinct.index(prompt) for prompt in prompts])
    return jax.tree.map(lambda leaf: leaf[rows], encoded)


def usual_guidance(model: Any) -> float:
    """The guidance that samples are drawn with unless told otherwise: 7.5 for text.

    Flux has its guidance within, or none.
    """
    from memjax.checkpoints._layout import FLUX
    from memjax.networks.unet2d_condition import TextCondition

    text = isinstance(model.null_condition, TextCondition) and model.origin.network != FLUX
    return 7.5 if text else 1.0
