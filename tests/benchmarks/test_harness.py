"""The benchmark harness: right before fast, and figures from JSON alone."""

import ast
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
    modules = harness.modules()
    assert sum(len(module.cases()) for module in modules.values()) == len(known)
    # Its results are drawn by the module that it is named after.
    assert {name.split("/")[0] for name in known} <= set(modules)
    prefix = next(iter(known)).split("/")[0]
    assert [c.name for c in harness.select([prefix])] == [
        n for n in known if n.startswith(prefix + "/")
    ]
    with pytest.raises(SystemExit, match="no benchmark named 'nothing'"):
        harness.select(["nothing"])


def baseline(harness, **changes):
    matrix = jnp.eye(4) * 2
    settings = {
        "run": lambda a: jnp.sum(a @ a),
        "arguments": (matrix,),
        "check": lambda out: abs(float(out) - 16),
        "target": 1e9,
    }
    return harness.Baseline(**(settings | changes))


def test_a_program_is_measured_in_turn_with_its_baselines(harness):
    order = []

    def logged(name, out):
        order.append(name)
        return out

    ours = case(
        harness,
        jit=False,
        run=lambda a, v: logged("ours", a @ v),
        baselines={
            "easy": baseline(harness, run=lambda a: logged("easy", 16.0), jit=False),
            "hard": baseline(harness, target=0.0),
            "idle": baseline(harness, target=None, forwards=1),
        },
    )
    record = harness.measure(ours, quick=True)
    assert record["status"] == "ok"
    # Once for the check and once to warm up, then in turn.
    assert order == ["ours", "easy"] * 5
    for name, extra in (("easy", 0), ("hard", 0), ("idle", 1)):
        entry = record["baselines"][name]
        assert entry["seconds"]["repeats"] == record["seconds"]["repeats"] == 3
        above = record["seconds"]["minimum"] - extra * record["forward_seconds"]
        assert entry["ratio"] == pytest.approx(above / entry["seconds"]["minimum"])
    assert [target["met"] for target in record["targets"]] == [True, False]
    assert json.loads(json.dumps(record)) == record
    line = harness.line(record)
    assert "met    time over that of easy" in line
    assert "MISSED time over that of hard" in line


def test_nothing_is_timed_unless_the_baseline_is_right_too(harness):
    wrong = {"fast and wrong": baseline(harness, check=lambda out: np.nan)}
    record = harness.measure(case(harness, baselines=wrong), quick=True)
    assert record["status"] == "failed"
    assert np.isnan(record["error"])
    assert not {"seconds", "baselines"} & set(record)


def table(harness, rows, targets=()):
    return harness.Case(
        "tiny/table",
        lambda quick, seed: harness.Table(lambda: (rows, list(targets)), {"size": 4}),
    )


def test_a_table_keeps_rows_that_fail_and_targets_that_are_missed(harness, tmp_path):
    rows = [
        {"method": "a", "status": "ok", "products": 4, "error": 0.1},
        {"method": "b", "status": "failed", "products": 4},
        {"method": "c", "status": "not installed"},
    ]
    targets = [harness.Target("error of a", 0.1, 0.2), harness.Target("of b", np.nan, 1.0)]
    record = harness.measure(table(harness, rows, targets), quick=True, seed=5)
    assert record["status"] == "ok"
    assert record["rows"] == rows
    assert [target["met"] for target in record["targets"]] == [True, False]
    assert (record["parameters"], record["seed"]) == ({"size": 4}, 5)
    assert not {"seconds", "error"} & set(record)
    assert set(record["git"]) == {"commit", "dirty"}
    harness.write(record, tmp_path)
    (kept,) = harness.read(tmp_path, quick=True)["tiny"]
    assert kept["rows"] == rows
    line = harness.line(record)
    assert "1 ok, 1 failed, 1 not installed" in line
    assert "MISSED of b" in line


def test_a_missing_peer_is_no_failure(harness, tmp_path, monkeypatch, capsys):
    def make(quick, seed):
        harness.require("json", "a_package_that_nobody_has")

    absent = harness.Case("tiny/peer", make)
    record = harness.measure(absent, quick=True)
    assert (record["status"], record["message"]) == ("not installed", "a_package_that_nobody_has")
    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(harness, "select", lambda patterns: [absent])
    monkeypatch.setattr(harness, "run_case", lambda name, quick, seed: record)
    assert main.main(["run", "tiny", "--results", str(tmp_path)]) == 0
    assert "not installed: a_package_that_nobody_has" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "no record in the place of one with the peer"


def test_peers_are_imported_by_the_cases_that_need_them():
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"torch", "matfree", "traceax"} & {n.split(".")[0] for n in names}, path.name


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
