"""What a folder holds, from its JSON files alone: a diffusers pipeline, or one of its networks."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memjax._core.errors import CheckpointError, InputError
from memjax._core.text import one_line
from memjax.checkpoints._safetensors import read_json, refuse_pickle
from memjax.checkpoints._scheduler import is_distilled

INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
FLUX = "FluxTransformer2DModel"
NETWORKS = ("UNet2DModel", "UNet2DConditionModel", FLUX)
"""Classes whose output is a score; others come through ``memjax.from_torch``."""
SCORES = ("unet", "transformer")
"""Parts of a pipeline that become its score, in the order in which they are looked for."""
VAES = ("AutoencoderKL",)

_WAY_OUT = "load it in PyTorch and hand the module to memjax.from_torch"
_DISTILLED_WORDS = {"dmd", "dmd2", "lcm", "lightning", "schnell", "turbo"}
_MAX_SIDE = 2**14
_FLUX_SIDES = (128, 128)


class Layout(NamedTuple):
    """A folder of diffusers.

    Attributes:
        root: the folder.
        index: content of ``model_index.json``; empty for the folder of one network.
        part: the network that becomes the score, such as ``"unet"``.
        folder: where its files are.
        kind: its class.
        config: its configuration.
        sample_size: height and width of what the network takes, where the caller says so.
    """

    root: Path
    index: dict[str, Any]
    part: str
    folder: Path
    kind: str
    config: dict[str, Any]
    sample_size: tuple[int, int] | None = None

    @property
    def config_file(self) -> Path:
        """The file of ``config``."""
        return self.folder / CONFIG_FILE

    @property
    def pipeline(self) -> str:
        """Class of the pipeline; empty for the folder of one network."""
        return _class_name(self.root / INDEX_FILE, self.index) if self.index else ""

    def parts(self) -> dict[str, str]:
        """Classes of the pipeline's parts by name, without those that are null."""
        return _parts(self.index)

    def scheduler(self) -> tuple[Path, dict[str, Any]]:
        """The file that says how noise was added, and its content."""
        places = [self.root / "scheduler", self.root]
        if not self.index:
            places = [self.root, self.root / "scheduler", self.root.resolve().parent / "scheduler"]
        for place in places:
            if (place / SCHEDULER_FILE).is_file():
                return place / SCHEDULER_FILE, read_json(place / SCHEDULER_FILE)
        raise CheckpointError(
            f"{self.root}: expected {SCHEDULER_FILE}, in it or in its folder scheduler, found "
            "none: weights alone do not say how noise was added; save the scheduler of the training"
        )

    def require(self, name: str, kinds: tuple[str, ...], file: str | None = CONFIG_FILE) -> Path:
        """The folder of a part that the index lists, of one of these classes, with this file."""
        found = self.parts()[name]
        if found not in kinds:
            raise CheckpointError(
                f"{self.root / INDEX_FILE}: {name}: expected {' or '.join(kinds)}, found "
                f"{one_line(found, limit=80)}; {_WAY_OUT}"
            )
        return _part_folder(self.root, name, file)


def recognize(path: Path, component: str | None = None) -> Layout:
    """Find the network of a diffusers folder that becomes the score.

    Args:
        path: folder of a pipeline or of one network.
        component: name of the pipeline's part; None for ``"unet"``, or else ``"transformer"``.

    Returns:
        What is where.

    Raises:
        CheckpointError: nothing that is known, named in one line with the way out.
    """
    if not path.is_dir():
        refuse_pickle(path)
        found = "a file" if path.exists() else "nothing"
        hint = ""
        if path.suffix == ".safetensors":
            hint = "; diffusers' from_single_file(file).save_pretrained(folder) makes one"
        raise CheckpointError(f"{path}: expected the folder of a model, found {found}{hint}")
    if (path / INDEX_FILE).is_file():
        return _pipeline(path, component)
    if component is not None:
        raise CheckpointError(
            f"{path}: component: expected a pipeline with a {INDEX_FILE}, found none"
        )
    if not (path / CONFIG_FILE).is_file():
        refuse_pickle(path)
        raise CheckpointError(
            f"{path}: expected a file {CONFIG_FILE} or {INDEX_FILE}, found neither"
        )
    config = read_json(path / CONFIG_FILE)
    kind = _class_name(path / CONFIG_FILE, config)
    _check_network(path / CONFIG_FILE, kind, config)
    return Layout(path, {}, "network", path, kind, config)


def _pipeline(path: Path, component: str | None) -> Layout:
    index = read_json(path / INDEX_FILE)
    file, parts = path / INDEX_FILE, _parts(index)
    _class_name(file, index)
    name = component or next((name for name in SCORES if name in parts), "")
    if name not in parts:
        listed = ", ".join(f"{part} ({kind})" for part, kind in parts.items()) or "none"
        wanted = repr(one_line(name, limit=80)) if name else " or ".join(map(repr, SCORES))
        hint = "name another with component=, or" if component is None else "or"
        raise CheckpointError(
            f"{file}: expected a part {wanted}, found {one_line(listed, limit=300)}; {hint} "
            f"{_WAY_OUT}"
        )
    _check_network(file, parts[name], index)
    folder = _part_folder(path, name, CONFIG_FILE)
    config = read_json(folder / CONFIG_FILE)
    kind = _class_name(folder / CONFIG_FILE, config)
    if kind != parts[name]:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: _class_name: expected {parts[name]}, as {INDEX_FILE} says, "
            f"found {one_line(kind, limit=80)}"
        )
    return Layout(path, index, name, folder, kind, config)


def _parts(index: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        if isinstance(value[1], str):
            found[name] = value[1]
    return found


def _part_folder(root: Path, name: str, file: str | None) -> Path:
    """The part's own folder; or the root, where small pipelines keep all files."""
    if not re.fullmatch(r"\w+", name):
        raise CheckpointError(f"{root}: expected the name of a part, found {one_line(repr(name))}")
    for folder in (root / name, root):
        if folder.is_dir() if file is None else (folder / file).is_file():
            return folder
    raise CheckpointError(
        f"{root}: expected {name}/{file}, which {INDEX_FILE} lists, found none; download that "
        "part, or load one network by its own folder"
    )


def _class_name(file: Path, config: Mapping[str, Any]) -> str:
    kind = config.get("_class_name")
    if isinstance(kind, str):
        return one_line(kind, limit=80)
    hint = ""
    if "architectures" in config or "model_type" in config:
        hint = "; a model of transformers is no score"
    raise CheckpointError(
        f"{file}: expected _class_name, the model's class in diffusers, found none{hint}"
    )


def _check_network(file: Path, kind: str, config: Mapping[str, Any]) -> None:
    if kind not in NETWORKS:
        raise CheckpointError(
            f"{file}: expected {', '.join(NETWORKS[:-1])} or {NETWORKS[-1]}, found "
            f"{one_line(kind, limit=80)}; {_WAY_OUT}"
        )


@contextlib.contextmanager
def blamed_on(file: Path) -> Iterator[None]:
    """Faults found in a file's content, with the file's name before them."""
    try:
        yield
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{file}: {one_line(str(error))}") from None


def warn_if_distilled(layout: Layout, scheduler: Mapping[str, Any]) -> None:
    """Warn of a network that was trained to imitate samples, not to fit the data.

    Told by its scheduler, its options or its name: a network of Latent Consistency Models, a
    turbo, a network that takes the guidance as an input. And every one of Flux: of those published,
    the ones that take no guidance (schnell) reach samples in a few steps.
    """
    reason = None
    if layout.kind == FLUX:
        reason = "Flux without guidance as an input, as schnell"
    if is_distilled(scheduler):
        reason = f"its scheduler is {scheduler['_class_name']}"
    for option in ("time_cond_proj_dim", "guidance_embeds"):
        if layout.config.get(option):
            reason = f"its option {option} takes the guidance as an input"
    names = [layout.root.resolve().name]
    names += [str(c.get("_name_or_path", "")) for c in (layout.index, layout.config)]
    for name in names:
        if _DISTILLED_WORDS & set(re.split(r"[^a-z0-9]+", Path(name).name.lower())):
            reason = f"its name is {one_line(Path(name).name, limit=80)!r}"
    if reason is not None:
        warnings.warn(
            f"{layout.root.name}: this looks like a distilled model ({reason}): its network was "
            "trained to reach samples in a few steps or at a fixed guidance, and is not the score "
            "of the density it was trained on",
            stacklevel=4,
        )


def sample_sides(layout: Layout) -> tuple[int, int]:
    """Height and width of what the network takes: those given, else those of its configuration.

    The configuration of Flux does not say; its pipeline draws latents of 128 x 128.
    """
    size = layout.config.get("sample_size")
    if layout.sample_size is not None:
        height, width = layout.sample_size
    elif size is None and layout.kind == FLUX:
        height, width = _FLUX_SIDES
    elif (sides := _sides(size)) is None:
        raise CheckpointError(
            f"{layout.config_file}: sample_size: expected a number of pixels, or two, found "
            f"{one_line(repr(size), limit=80)}; write into the file the size that it was trained "
            "on, or give memjax.load a sample_size"
        )
    else:
        height, width = sides
    if layout.kind == FLUX and (height % 2 or width % 2):
        raise InputError(f"sample_size: expected even sides for {FLUX}, got {[height, width]}")
    return height, width


def with_sample_size(layout: Layout, size: Any) -> Layout:
    """The same folder, its network taking what is of this size; as it is for None."""
    if size is None:
        return layout
    sides = _sides(size)
    if sides is None:
        raise InputError(
            f"sample_size: expected a number of pixels from 1 to {_MAX_SIDE}, or two, got "
            f"{one_line(repr(size), limit=80)}"
        )
    return layout._replace(sample_size=sides)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width, of two numbers or one; None where these are not two sides."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= _MAX_SIDE for side in sides):
        return None
    return sides


def image_sides(layout: Layout) -> tuple[int, int]:
    """Height and width of an image; where there is a VAE, each of its levels but one halves it."""
    height, width = sample_sides(layout)
    if "vae" not in layout.parts():
        return height, width
    levels = read_json(layout.require("vae", VAES) / CONFIG_FILE).get("block_out_channels", [0])
    factor = 2 ** (len(levels) - 1) if isinstance(levels, list) else 1
    return factor * height, factor * width
