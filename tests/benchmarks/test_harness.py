"""The benchmark harness: right before fast, and figures from JSON alone."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def harness(monkeypatch):
    """The harness lies beside the package, outside what is installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.harness")


def program(harness, calls=None, **changes):
    matrix, vector = jnp.eye(4) * 2, jnp.arange(4.0)

    def run(a, v):
        if calls is not None:
            calls.append(1)
        return a @ v

    settings = {
        "run": run,
        "arguments": (matrix, vector),
        "check": lambda out: float(np.max(np.abs(np.asarray(out) - 2 * np.arange(4)))),
        "tolerance": 1e-6,
        "forward": (jnp.sin, (vector,)),
        "parameters": {"size": 4},
    }
    return harness.Program(**(settings | changes))


def case(harness, **changes):
    return harness.Case("tiny/product", lambda quick, seed: program(harness, **changes))


def test_a_record_holds_what_a_reader_needs(harness):
    record = harness.measure(case(harness), quick=True, seed=3)
    assert record["status"] == "ok"
    assert (record["case"], record["seed"], record["quick"]) == ("tiny/product", 3, True)
    assert record["parameters"] == {"size": 4}
    assert record["compile_seconds"] > 0
    seconds = record["seconds"]
    assert 0 < seconds["minimum"] <= seconds["median"]
    assert seconds["repeats"] == 3
    assert record["forwards"] == pytest.approx(seconds["minimum"] / record["forward_seconds"])
    assert record["peak_memory_bytes"] > 2**20
    assert {"python", "jax", "jaxlib"} <= set(record["versions"])
    assert record["cpu"]["count"] == os.cpu_count()
    assert record["device"]["platform"]
    assert set(record["git"]) == {"commit", "dirty"}
    assert json.loads(json.dumps(record)) == record


def test_a_wrong_result_is_never_timed(harness):
    calls = []
    record = harness.measure(
        case(harness, calls=calls, jit=False, check=lambda out: 0.5), quick=True
    )
    assert record["status"] == "failed"
    assert record["error"] == 0.5
    assert not {"seconds", "forwards", "compile_seconds", "peak_memory_bytes"} & set(record)
    assert len(calls) == 1, "run once, to be checked"
    line = harness.line(record)
    assert "FAILED" in line
    assert "ms" not in line


def test_nan_error_is_a_failure(harness):
    assert (
        harness.measure(case(harness, check=lambda out: np.nan), quick=True)["status"] == "failed"
    )


def test_several_products_in_one_run_count_each(harness):
    record = harness.measure(case(harness, units=1000), quick=True)
    assert record["seconds"]["products_per_run"] == 1000
    assert record["seconds"]["minimum"] < 1e-3


def test_records_name_no_place(harness):
    text = json.dumps(harness.measure(case(harness), quick=True))
    for place in (str(ROOT), str(Path.home()), os.uname().nodename, os.sep + "tmp"):
        assert place not in text


def test_quick_results_do_not_replace_the_others(harness, tmp_path):
    record = harness.measure(case(harness), quick=True)
    quick = harness.write(record, tmp_path)
    full = harness.write(record | {"quick": False}, tmp_path)
    assert quick != full
    assert harness.read(tmp_path) == {"tiny": [record | {"quick": False}]}
    assert harness.read(tmp_path, quick=True) == {"tiny": [record]}


def test_figures_come_from_json_alone(harness, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    good = harness.measure(case(harness), quick=True)
    bad = harness.measure(case(harness, check=lambda out: 1.0), quick=True)
    for record in (good, bad | {"case": "tiny/wrong"}, good | {"case": "tiny/again"}):
        harness.write(record, tmp_path)

    def no_measuring(*args, **kwargs):
        raise AssertionError("plot must not measure")

    monkeypatch.setattr(harness, "measure", no_measuring)
    monkeypatch.setattr(harness, "run_case", no_measuring)
    (path,) = harness.plot(tmp_path, tmp_path / "figures", quick=True)
    assert path.name == "tiny.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_case_has_its_own_name_and_file(harness):
    known = harness.cases()
    assert len({harness.result_path({"case": n, "quick": False}) for n in known}) == len(known)
    for name, module in harness.modules().items():
        assert all(case.name.startswith(f"{name}/") for case in module.cases())
    prefix = next(iter(known)).split("/")[0]
    assert [c.name for c in harness.select([prefix])] == [
        n for n in known if n.startswith(prefix + "/")
    ]
    with pytest.raises(SystemExit, match="no benchmark named 'nothing'"):
        harness.select(["nothing"])


@pytest.mark.slow
def test_command_runs_a_case_in_a_fresh_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    base = [sys.executable, "-m", "benchmarks"]
    name = "linearize/mlp/jvp"
    done = subprocess.run(
        [*base, "run", name, "--quick", "--results", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert name in done.stdout
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["status"] == "ok"
    listed = subprocess.run(
        [*base, "list"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert name in listed.stdout.splitlines()
