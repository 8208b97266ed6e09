"""The check of the installed stack: right numbers pass, every injected fault stops."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core import backend
from memjax._core.backend import check_backend

COMPUTE = backend._compute


@pytest.fixture(scope="module")
def recorded():
    """Every result of one clean run, in order, so that faults need no device."""
    outputs = []

    def record(program, *args):
        outputs.append(COMPUTE(program, *args))
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_compute", record)
        report = check_backend()
    return report, outputs


def replay(monkeypatch, outputs, corrupt):
    """Run the check on recorded results, one of them corrupted."""
    stream = iter(enumerate(outputs))

    def compute(program, *args):
        index, out = next(stream)
        return corrupt(index, out.copy())

    monkeypatch.setattr(backend, "_compute", compute)
    return check_backend()


def test_this_installation_passes(recorded):
    report, _ = recorded
    assert report.ok, str(report)
    assert all(check.ok for check in report.checks)
    assert report.message.startswith(f"{len(report.checks)} checks passed")
    names = " | ".join(check.name for check in report.checks)
    for word in ("batched", "vmapped", "looped", "scanned", "transpose", "convolution"):
        assert word in names
    rows = {
        int(n) for n in re.findall(r"(\d+) (?:rows|images)|batch of (\d+)", names) for n in n if n
    }
    assert min(rows) == 1
    assert {64, 96, 40_000} <= rows


def test_float64_is_checked_where_it_is_on(x64):
    report = check_backend()
    assert report.ok, str(report)
    double = [check for check in report.checks if check.name.endswith("float64")]
    assert len(double) == sum(check.name.endswith("float32") for check in report.checks)
    assert max(check.error for check in double) < 1e-13


def add(share, size):
    """Add ``size`` of the largest entry to the last ``share`` of the rows."""

    def corrupt(out):
        rows = max(1, int(len(out) * share))
        out[-rows:] += size * np.abs(out).max()
        return out

    return corrupt


def one_row(value):
    def corrupt(out):
        out[len(out) // 2] = value
        return out

    return corrupt


FAULTS = {
    "half of all rows off by 0.28": add(0.5, 0.28),
    "the last row off by 1e-3": add(0.0, 1e-3),
    "the last row off by 1e-4": add(0.0, 1e-4),
    "one row NaN": one_row(np.nan),
    "one row infinite": one_row(np.inf),
    "one row never written": one_row(0.0),
    "rows in the wrong order": lambda out: out[::-1],
    "first row everywhere": lambda out: np.repeat(out[:1], len(out), axis=0),
    "sign": lambda out: -out,
    "a row short": lambda out: out[:-1],
}
# Position in the run: Jacobians forward at 64 rows, transposed at 96, looped, reduced at 40,000.
PLACES = {"vmapped Jacobian, forward mode, 64": 4, "products reduced row by row, 40000": 16}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_injected_fault_is_caught_and_named(monkeypatch, recorded, fault, place):
    _, outputs = recorded
    report = replay(
        monkeypatch,
        outputs,
        lambda index, out: FAULTS[fault](out) if index == PLACES[place] else out,
    )
    assert not report.ok
    (failed,) = (check for check in report.checks if not check.ok)
    assert failed.name.startswith(place)
    assert failed.name in report.message
    assert "wrong numbers" in report.message
    assert "\n" not in report.message


def test_a_fault_in_any_check_is_caught(monkeypatch, recorded):
    report, outputs = recorded
    products = [check for check in report.checks if check.name.endswith(("float32", "float64"))]
    for place, check in enumerate(products):
        found = replay(
            monkeypatch,
            outputs,
            lambda index, out, place=place: add(0.0, 1e-4)(out) if index == place else out,
        )
        assert [c.name for c in found.checks if not c.ok] == [check.name]


@pytest.mark.slow
def test_fifty_clean_runs_raise_no_alarm():
    for seed in range(50):
        report = check_backend(seed=seed)
        assert report.ok, str(report)


def with_jaxlib(monkeypatch, version):
    versions = backend._versions() | {"jaxlib": version}
    monkeypatch.setattr(backend, "_versions", lambda: versions)


def test_defect_of_jaxlib_0_10_2_is_named(monkeypatch, recorded):
    _, outputs = recorded
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with_jaxlib(monkeypatch, "0.10.2")
    report = replay(
        monkeypatch, outputs, lambda index, out: add(0.5, 0.28)(out) if index == 4 else out
    )
    assert not report.ok
    assert report.message.startswith("jaxlib 0.10.2 computes wrong numbers on CPU")
    assert "pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'" in report.message
    assert "vmapped Jacobian, forward mode, 64 rows" in report.message


def test_defective_release_stops_even_where_these_sizes_are_right(monkeypatch, recorded):
    _, outputs = recorded
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with_jaxlib(monkeypatch, "0.10.2")
    report = replay(monkeypatch, outputs, lambda index, out: out)
    assert not report.ok
    assert "jaxlib 0.10.2" in report.message
    # With the faulty fusion switched off only the measurement decides.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert replay(monkeypatch, outputs, lambda index, out: out).ok


def rounded(array, bits):
    """Round float32 to ``bits`` stored mantissa bits, as a matrix unit does with its inputs."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    scale = 2.0 ** (bits + 1)
    return (np.round(mantissa * scale) / scale * 2.0**exponent).astype(array.dtype)


def reduced_precision(bits, applies):
    def compute(program, *args):
        if applies(program):
            args = jax.tree.map(lambda a: rounded(np.asarray(a), bits), args)
        return COMPUTE(program, *args)

    return compute


@pytest.mark.parametrize(("bits", "name"), [(10, "TF32"), (7, "bfloat16")])
def test_low_default_precision_is_said_and_is_no_defect(monkeypatch, bits, name):
    default = {id(p) for (_, precision), p in backend._UNITS.items() if precision == "default"}
    monkeypatch.setattr(
        backend, "_compute", reduced_precision(bits, lambda program: id(program) in default)
    )
    report = check_backend()
    assert report.ok
    assert f"{name} ({bits} mantissa bits)" in report.message
    assert report.settings["precision of a matmul by default"].startswith(name)


@pytest.mark.parametrize(("bits", "name"), [(10, "TF32"), (7, "bfloat16")])
def test_low_precision_in_spite_of_highest_stops(monkeypatch, bits, name):
    monkeypatch.setattr(backend, "_compute", reduced_precision(bits, lambda program: True))
    report = check_backend()
    assert not report.ok
    assert "precision 'highest' is not delivered" in report.message
    assert name in report.message


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.bfloat16, 7), (jnp.float16, 10), (jnp.float32, 23)]
)
def test_mantissa_bits_of_real_formats(dtype, bits):
    def product(a, b):
        return jnp.dot(a.astype(dtype), b.astype(dtype)).astype(jnp.float32)

    assert backend._mantissa_bits(product) == bits


def test_report_prints_what_one_must_know(recorded):
    report, _ = recorded
    text = str(report)
    for package in ("python", "jax", "jaxlib", "flax", "optax", "diffrax", "equinox", "numpy"):
        assert f"{package} {report.versions[package]}" in text
    for device in report.devices:
        assert device in text
    for check in report.checks:
        assert check.name in text
    assert "jax_enable_x64" in text
    assert text.splitlines()[-1] == f"ok: {report.message}"


def test_numpy_references_agree_with_finite_differences():
    rng = np.random.default_rng(3)
    weights = backend._draw_mlp(rng, np.float64)
    x, v = rng.standard_normal((2, 3, 64))
    _, jacobian = backend._numpy_mlp(weights, x)
    h = 1e-6
    slope = (
        backend._numpy_mlp(weights, x + h * v)[0] - backend._numpy_mlp(weights, x - h * v)[0]
    ) / (2 * h)
    np.testing.assert_allclose(np.einsum("nij,nj->ni", jacobian, v), slope, rtol=0, atol=1e-7)

    kernels = [rng.standard_normal((3, 3, 3, 5)), rng.standard_normal((3, 3, 5, 3))]
    images, u, w = rng.standard_normal((3, 2, 8, 8, 3))
    value, tangent, _ = np.moveaxis(backend._numpy_convnet(kernels, images, u), 1, 0)
    _, _, transposed = np.moveaxis(backend._numpy_convnet(kernels, images, w), 1, 0)
    near = backend._numpy_convnet(kernels, images + h * u, u)[:, 0]
    np.testing.assert_allclose((near - value) / h, tangent, rtol=0, atol=1e-2)
    np.testing.assert_allclose(np.sum(w * tangent), np.sum(transposed * u), rtol=1e-12)


@pytest.mark.slow
def test_import_touches_no_device_and_changes_no_setting():
    code = (
        "import jax; before = dict(jax.config.values); import memjax._core.backend as b; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); "
        "assert b.check_backend().ok; assert dict(jax.config.values) == before"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
