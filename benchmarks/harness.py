"""Measure a case in a process of its own: right first, then fast.

A case makes a ``Program`` or a ``Table``. A program is measured by the clock: ``measure`` compiles
it (timed apart), checks the result, and only then runs it repeatedly, waiting for every output,
in turn with one forward evaluation and with the baselines it is compared with. A table is
computed once, without a clock: rows of errors against products, ours and those of peers.
Peak memory is that of the process, which is why each case gets a fresh one (``run_case``).
Peers are optional (the extra ``bench``, and PyTorch, installed apart): what is missing is reported
as not installed. What fails or loses is recorded like the rest.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import benchmarks

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
PACKAGES = ("jax", "jaxlib", "flax", "equinox", "numpy")
PEERS = ("matfree", "scipy", "torch", "traceax")
"""Recorded with a version where a case has imported them."""
NOT_CASES = ("harness", "reproductions")
SECONDS = 5.0
"""Time spent repeating each program of a case, unless the repeats run out first."""
REPEATS = 50


class NotInstalledError(Exception):
    """A peer that a case needs is not here; the message is its name."""


def require(*packages: str) -> None:
    """Raise ``NotInstalledError`` unless every package can be imported."""
    for package in packages:
        if not installed(package):
            raise NotInstalledError(package)


def installed(package: str) -> bool:
    """Whether a package is here, without importing it."""
    return importlib.util.find_spec(package) is not None


class Baseline(NamedTuple):
    """What a program is measured against, in turn with it in one process.

    Attributes:
        run: function of ``arguments``; compiled by ``jax.jit`` if ``jit``.
        arguments: pytrees of arrays, or whatever a peer takes.
        check: the result's error; nothing is timed unless the baseline is right too.
        forwards: forward evaluations that the program may take on top of the baseline; the ratio
            is (program - forwards x forward) / baseline.
        target: the ratio aimed at, at most; ``None`` where there is none.
        jit: false for a program that is not JAX's.
    """

    run: Callable[..., Any]
    arguments: tuple
    check: Callable[[Any], float]
    forwards: int = 0
    target: float | None = None
    jit: bool = True


class Program(NamedTuple):
    """What a case measures; built inside its process.

    Attributes:
        run: function of ``arguments``; compiled by ``jax.jit`` if ``jit``.
        arguments: pytrees of arrays. Weights are among them, never closed over.
        check: the result's error against an independent computation.
        tolerance: largest error at which the time is worth recording.
        forward: ``(function, arguments)`` of one forward evaluation at the same batch, the unit
            of cost; ``None`` where there is none.
        units: products in one run: recorded times are per product.
        parameters: sizes and settings, for the record.
        dtype: of the computation.
        jit: false for a program that is not JAX's, such as a NumPy twin.
        baselines: other programs by name, right to the same tolerance.
    """

    run: Callable[..., Any]
    arguments: tuple
    check: Callable[[Any], float]
    tolerance: float
    forward: tuple[Callable[..., Any], tuple] | None = None
    units: int = 1
    parameters: Mapping[str, Any] = MappingProxyType({})
    dtype: str = "float32"
    jit: bool = True
    baselines: Mapping[str, Baseline] = MappingProxyType({})


class Target(NamedTuple):
    """A number the project has set itself, and what was found.

    Attributes:
        what: what the number is of.
        value: found.
        bound: the largest that is good enough.
    """

    what: str
    value: float
    bound: float

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**self._asdict(), "met": bool(self.value <= self.bound)}


class Table(NamedTuple):
    """Rows computed once, the same on every run.

    Attributes:
        compute: ``() -> (rows, targets)``. A row has a ``method``, a ``status`` ("ok", "not
            installed", or what went wrong) and whatever the module's figure draws.
        parameters: sizes and settings, for the record.
        dtype: of the computation.
    """

    compute: Callable[[], tuple[list[dict[str, Any]], list[Target]]]
    parameters: Mapping[str, Any] = MappingProxyType({})
    dtype: str = "float64"


class Case(NamedTuple):
    """A named program or table: ``module/what/variant``.

    Attributes:
        name: unique; its first part is the module whose results and figure it belongs to.
        make: ``make(quick, seed)`` builds it, smaller if ``quick``.
    """

    name: str
    make: Callable[[bool, int], Program | Table]


def modules() -> dict[str, Any]:
    """The benchmark modules by name; those that begin with an underscore serve them."""
    found = [m.name for m in pkgutil.iter_modules(benchmarks.__path__)]
    names = [name for name in found if not name.startswith("_") and name not in NOT_CASES]
    return {name: importlib.import_module(f"benchmarks.{name}") for name in sorted(names)}


def cases() -> dict[str, Case]:
    """Every case of every module, by name."""
    return {case.name: case for module in modules().values() for case in module.cases()}


def select(patterns: list[str]) -> list[Case]:
    """Cases whose name is or begins with a pattern; all of them without one.

    Raises:
        SystemExit: a pattern that selects nothing, with the names there are.
    """
    known = cases()
    for pattern in patterns:
        if not any(_selects(pattern, name) for name in known):
            raise SystemExit(f"no benchmark named {pattern!r}; there are: {', '.join(known)}")
    return [
        case
        for name, case in known.items()
        if not patterns or any(_selects(pattern, name) for pattern in patterns)
    ]


def _selects(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern.rstrip("/") + "/")


def measure(case: Case, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run one case in this process and return its record.

    Args:
        case: what to measure.
        quick: build it small, and repeat it three times only.
        seed: passed to ``make``.

    Returns:
        The record. With ``status`` "failed" it holds the error and no time.
    """
    import jax

    _git()
    record = {"case": case.name, "seed": seed, "quick": quick}
    try:
        made = case.make(quick, seed)
    except NotInstalledError as missing:
        return record | {"status": "not installed", "message": str(missing)}
    record |= {"parameters": dict(made.parameters), "dtype": made.dtype}
    if isinstance(made, Table):
        rows, targets = made.compute()
        targets = [target.record() for target in targets]
        return record | {"status": "ok", "rows": rows, "targets": targets, **machine()}
    program = made
    jax.block_until_ready(program.arguments)
    run, compile_seconds = _compile(program.run, program.arguments, program.jit)
    _reset_peak()  # what building and compiling took is not the program's
    held = _peak_bytes()
    out = jax.block_until_ready(run(*program.arguments))
    # Read before the check, whose reference may be larger than what is measured.
    peak = _peak_bytes()
    errors = {"": float(program.check(out))}
    del out
    baselines = {}
    for name, baseline in program.baselines.items():
        baselines[name] = _compile(baseline.run, baseline.arguments, baseline.jit)
        errors[name] = float(baseline.check(baselines[name][0](*baseline.arguments)))
    right = all(error <= program.tolerance for error in errors.values())  # false for NaN
    record |= {
        "status": "ok" if right else "failed",
        "error": max(errors.values(), key=lambda error: (math.isnan(error), error)),
        "tolerance": program.tolerance,
        **machine(),
    }
    if not right:
        return record
    forward, unit_arguments = program.forward or (None, ())
    unit = None if forward is None else (_compile(forward, unit_arguments, True)[0], unit_arguments)
    others = [(baselines[name][0], b.arguments) for name, b in program.baselines.items()]
    seconds, unit_seconds, *rivals = _time((run, program.arguments), unit, others, quick)
    record |= {
        "compile_seconds": compile_seconds,
        "seconds": _summary(seconds, program.units),
        "peak_memory_bytes": peak,
        "memory_above_arguments_bytes": peak - held,
    }
    if unit_seconds:
        record["forward_seconds"] = min(unit_seconds)
        record["forwards"] = record["seconds"]["minimum"] / min(unit_seconds)
    if not program.baselines:
        return record
    record |= {"baselines": {}, "targets": []}
    for (name, baseline), times in zip(program.baselines.items(), rivals, strict=True):
        ratios = [
            (least(seconds) - (baseline.forwards and baseline.forwards * least(unit_seconds)))
            / least(times)
            for least in (min, statistics.median)
        ]
        record["baselines"][name] = {
            "compile_seconds": baselines[name][1],
            "seconds": _summary(times, program.units),
            "forwards_on_top": baseline.forwards,
            "ratio": ratios[0],
            "ratio_of_medians": ratios[1],
        }
        if baseline.target is not None:
            target = Target(f"time over that of {name}", ratios[0], baseline.target)
            record["targets"].append(target.record())
    return record


def _summary(seconds: list[float], units: int) -> dict[str, Any]:
    return {
        "minimum": min(seconds) / units,
        "median": statistics.median(seconds) / units,
        "repeats": len(seconds),
        "products_per_run": units,
    }


def _compile(run: Callable, arguments: tuple, jit: bool) -> tuple[Callable, float]:
    if not jit:
        return run, 0.0
    import jax

    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _time(
    program: tuple[Callable, tuple],
    unit: tuple[Callable, tuple] | None,
    others: list[tuple[Callable, tuple]],
    quick: bool,
) -> list[list[float]]:
    """Seconds of every repeat, taken in turn: the program, the unit of cost, the others."""
    import jax

    def once(call: tuple[Callable, tuple]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call[0](*call[1]))
        return time.perf_counter() - start

    calls = [program, unit, *others]
    times: list[list[float]] = [[] for _ in calls]
    present = [(call, own) for call, own in zip(calls, times, strict=True) if call is not None]
    for call, _ in present:
        once(call)
    repeats = 3 if quick else REPEATS
    end = time.perf_counter() + (0 if quick else SECONDS * (1 + len(others)))
    while len(times[0]) < 3 or (len(times[0]) < repeats and time.perf_counter() < end):
        for call, own in present:
            own.append(once(call))
    return times


def _reset_peak() -> None:
    """Let the peak start from what is held now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Largest memory this process has held: on the accelerator if there is one."""
    import jax

    on_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in on_device:
        return int(on_device["peak_bytes_in_use"])
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/status").read_text().splitlines():
            if entry.startswith("VmHWM:"):
                return 1024 * int(entry.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """Versions, device and commit; no path and no host name."""
    from importlib.metadata import version

    import jax

    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in PACKAGES}
        | {p: version(p) for p in PEERS if p in sys.modules},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(jax.devices()),
        },
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "git": _git(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


@functools.cache  # what the process has imported, whatever is committed while it runs
def _git() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/memjax", ":/benchmarks/*.py"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def run_case(name: str, *, quick: bool, seed: int) -> dict[str, Any]:
    """Measure one case in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "measure", name, "--seed", str(seed)]
    if quick:
        command.append("--quick")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": name, "status": "crashed", "message": last, "quick": quick, "seed": seed}
    return json.loads(done.stdout.splitlines()[-1])


def result_path(record: dict[str, Any], results: Path = RESULTS) -> Path:
    """Where a record is kept: quick ones beside the others, never in their place."""
    suffix = ".quick.json" if record["quick"] else ".json"
    return results / (record["case"].replace("/", "-") + suffix)


def write(record: dict[str, Any], results: Path = RESULTS) -> Path:
    """Write one record as JSON."""
    results.mkdir(parents=True, exist_ok=True)
    path = result_path(record, results)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path


def read(results: Path = RESULTS, *, quick: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Records by module, in the order of their names."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        if path.name.startswith("reproduction-"):  # of benchmarks.reproductions
            continue
        record = json.loads(path.read_text())
        if record["quick"] == quick:
            records.setdefault(record["case"].split("/")[0], []).append(record)
    return records


def line(record: dict[str, Any]) -> str:
    """One line for the terminal, and one for each target; a time only where it was right."""
    name = f"{record['case']:<44}"
    if record["status"] in ("crashed", "not installed"):
        return f"{name} {record['status']}: {record['message']}"
    if record["status"] == "failed":
        return f"{name} FAILED: error {record['error']:.2g} > {record['tolerance']:.2g}, not timed"
    targets = "".join(
        f"\n    {'met   ' if target['met'] else 'MISSED'} {target['what']}: "
        f"{target['value']:.3g}, aimed at <= {target['bound']:.3g}"
        for target in record.get("targets", ())
    )
    if "rows" in record:
        statuses = [row["status"] for row in record["rows"]]
        counts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
        return f"{name} rows: {', '.join(counts)}{targets}"
    seconds = record["seconds"]
    forwards = f"{record['forwards']:8.2f} forwards" if "forwards" in record else " " * 17
    return (
        f"{name} {1e3 * seconds['minimum']:10.3f} ms (median {1e3 * seconds['median']:.3f}) "
        f"{forwards} {record['memory_above_arguments_bytes'] / 2**20:8.0f} MiB "
        f"error {record['error']:.1e}{targets}"
    )


def plot(results: Path = RESULTS, figures: Path = FIGURES, *, quick: bool = False) -> list[Path]:
    """Draw one figure per module, from JSON only."""
    import matplotlib

    matplotlib.use("Agg")
    figures.mkdir(parents=True, exist_ok=True)
    known = modules()
    written = []
    for name, records in read(results, quick=quick).items():
        draw = getattr(known.get(name), "figure", bars)
        figure = draw(records)
        figure.text(
            0.995, 0.005, caption(records), ha="right", va="bottom", fontsize=7, color="0.4"
        )
        path = figures / f"{name}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def caption(records: list[dict[str, Any]]) -> str:
    """The command that made a figure, and on what."""
    good = next((record for record in records if "versions" in record), None)
    if good is None:
        return ""
    commit = (good["git"]["commit"] or "unknown")[:8] + ("+" if good["git"]["dirty"] else "")
    return (
        f"python -m benchmarks run {good['case'].split('/')[0]} --seed {good['seed']} | "
        f"{good['cpu']['count']} x {good['cpu']['model']}, {good['device']['platform']} | "
        f"jaxlib {good['versions']['jaxlib']} | {commit}"
    )


def bars(records: list[dict[str, Any]]):
    """Default figure: time per product, and memory, of every case that was right."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    good = [record for record in records if record["status"] == "ok"][::-1]
    labels = [record["case"].split("/", 1)[1] for record in good]
    layout = ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96))  # room for the caption
    figure = Figure(figsize=(11, 1.4 + 0.3 * len(good)), layout=layout)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.8, 1))
    times = [1e3 * record["seconds"]["minimum"] for record in good]
    left.plot(times, labels, "o", color="#4477aa")
    for i, (time_, record) in enumerate(zip(times, good, strict=True)):
        text = f"  {time_:.3g} ms"
        if "forwards" in record:
            text += f" = {record['forwards']:.2g} forwards"
        left.text(time_, i, text, va="center", fontsize=7)
    left.set_xscale("log")
    if times:
        left.set_xlim(min(times) / 2, 60 * max(times))  # room for the labels
    left.grid(axis="x", color="0.9")
    left.set_xlabel("milliseconds per product, minimum of repeats")
    memory = [record["memory_above_arguments_bytes"] / 2**20 for record in good]
    right.barh(labels, memory, color="#ccbb44")
    right.set_xlabel("MiB above the arguments, peak")
    return figure
