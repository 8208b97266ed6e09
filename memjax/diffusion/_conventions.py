"""The conventions a score function may be in, and how each is turned into ours."""

from typing import NamedTuple

import numpy as np


class Law(NamedTuple):
    """A convention that turns an output f into a score: s = c f + b x, per level."""

    code: str
    message: str
    c: np.ndarray
    b: np.ndarray | float = 0.0


class Arguments(NamedTuple):
    """A convention of the arguments: f = score(factor x, level)."""

    code: str
    message: str
    factor: np.ndarray
    level: np.ndarray


_CONVERT = "or let memjax.from_prediction convert the network"


def known_laws(sigma: np.ndarray) -> list[Law]:
    """What a network may return, ours first; of equal ones the first is named."""
    one = np.ones_like(sigma)
    vp = 1 / np.sqrt(1 + sigma**2)  # alpha of a variance-preserving process
    flow = 1 / (1 + sigma)  # and of x_t = (1 - t) x0 + t n
    t = sigma * flow
    power = "sigma_power"
    return [
        Law("", "", one),
        Law("sign", "the sign is flipped: return the negative", -one),
        Law(
            "noise",
            f"this is the predicted noise: the score is -output/sigma, {_CONVERT}",
            -1 / sigma,
        ),
        Law(
            "denoiser",
            f"this is the denoised sample: the score is (output - x)/sigma^2, {_CONVERT}",
            1 / sigma**2,
            -1 / sigma**2,
        ),
        Law(power, "this is sigma times the score: divide by sigma", 1 / sigma),
        Law(power, "this is sigma^2 times the score: divide by sigma^2", 1 / sigma**2),
        Law(power, "this is -sigma^2 times the score: divide by -sigma^2", -1 / sigma**2),
        Law(power, "this is the score over sigma: multiply by sigma", sigma),
        Law(power, "this is the score over -sigma: multiply by -sigma", -sigma),
        Law(power, "this is the score over sigma^2: multiply by sigma^2", sigma**2),
        Law(power, "this is the score over -sigma^2: multiply by -sigma^2", -(sigma**2)),
        Law(
            "velocity",
            f"this is a v-prediction, alpha n - sigma_t x0: {_CONVERT[3:]}",
            -vp / sigma,
            -(vp**2),
        ),
        Law(
            "velocity",
            f"this is a flow velocity, n - x0: {_CONVERT[3:]}",
            -t / sigma**2,
            -t / sigma**2,
        ),
        *(
            Law("alpha", f"this is the score {how}, alpha = {name}: {mend}", factor)
            for name, alpha in (("1/sqrt(1 + sigma^2)", vp), ("1/(1 + sigma)", flow))
            for how, mend, factor in (
                ("with respect to x_t = alpha x", "multiply by alpha", alpha),
                ("times alpha", "divide by alpha", 1 / alpha),
            )
        ),
    ]


def known_arguments(sigma: np.ndarray) -> list[Arguments]:
    """What a network may expect as x and sigma, ours first."""
    one = np.ones_like(sigma)
    coordinates = [
        Arguments(
            "coordinates",
            f"this expects x_t = alpha x, alpha = {name}: pass alpha * x (and multiply a score "
            f"with respect to x_t by alpha), {_CONVERT}",
            alpha,
            level,
        )
        for name, alpha in (
            ("1/sqrt(1 + sigma^2)", 1 / np.sqrt(1 + sigma**2)),
            ("1/(1 + sigma)", 1 / (1 + sigma)),
        )
        for level in (sigma, alpha * sigma)
    ]
    units = {
        "sigma^2": sigma**2,
        "sqrt(sigma)": np.sqrt(sigma),
        "log(sigma)": np.log(sigma),
        "log(sigma)/4": np.log(sigma) / 4,
        "log(sigma^2)": 2 * np.log(sigma),
        "1/sigma": 1 / sigma,
        "1/sigma^2": 1 / sigma**2,
        "sigma/sqrt(1 + sigma^2)": sigma / np.sqrt(1 + sigma**2),
        "sigma/(1 + sigma)": sigma / (1 + sigma),
        "127.5 sigma (pixels 0 to 255)": 127.5 * sigma,
        "255 sigma (pixels 0 to 255)": 255 * sigma,
        "sigma/2 (pixels 0 to 1)": sigma / 2,
    }
    return [
        Arguments("", "", one, sigma),
        *coordinates,
        *(
            Arguments("sigma_units", f"where sigma is passed this expects {name}", one, level)
            for name, level in units.items()
        ),
    ]
