"""What the operator benchmarks compare with is itself right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_rows_hold_errors_failures_and_absences(load):
    precision = load("_precision")

    def noisy(key, products):
        return jax.random.normal(key) / products, {"flagged": jnp.asarray(products > 2)}

    def sometimes_nan(key, products):
        return jnp.where(jax.random.uniform(key) < 0.5, jnp.nan, 1.0)

    def refuses(key, products):
        raise ValueError("only positive operators")

    methods = [
        precision.Method("memjax good", noisy, most=4),
        precision.Method("peer nan", sometimes_nan, "json"),
        precision.Method("peer refuses", refuses, "json"),
        precision.Method("peer absent", noisy, "a_package_that_nobody_has"),
    ]
    keys = jax.random.split(jax.random.key(0), 32)
    found = precision.rows(
        methods, [2, 4, 8], keys, np.abs, lambda extra: {k: int(v.sum()) for k, v in extra.items()}
    )
    good = [row for row in found if row["method"] == "memjax good"]
    assert [(row["products"], row["flagged"]) for row in good] == [(2, 0), (4, 32)]
    assert good[0]["low"] < good[0]["error"] < good[0]["high"]
    assert good[0]["error"] == pytest.approx(2 * good[1]["error"], rel=0.01)
    nans = [row for row in found if row["method"] == "peer nan"]
    assert all(row["status"] == "failed" and row["error"] == 1.0 for row in nans)
    assert all(row["failures"].endswith("of 32") for row in nans)
    assert {row["message"] for row in found if row["method"] == "peer refuses"} == {"ValueError"}
    assert found[-1] == {"method": "peer absent", "status": "not installed"}
    assert precision.error_of(found, "memjax good", 4) == good[1]["error"]
    assert np.isnan(precision.error_of(found, "peer nan", 4))
    with pytest.raises(ValueError, match="only positive"):
        precision.rows([precision.Method("memjax broken", refuses)], [2], keys, np.abs)


@pytest.mark.parametrize(("name", "at_16"), [("field-998", 0.41), ("field-500", 0.67)])
def test_the_local_fields_are_as_hard_as_the_published_ones(load, name, at_16):
    a, shape, positive = load("diagonals")._world(name, False, np.random.default_rng(0))
    assert (a.shape, shape, positive) == ((576, 576), (24, 24), False)
    assert np.allclose(a, a.T)
    # Random signs: the variance of an entry is the squared rest of its row over the products.
    off = np.sum(a**2) - np.sum(np.diag(a) ** 2)
    assert np.sqrt(off / 16) / np.linalg.norm(np.diag(a)) == pytest.approx(at_16, rel=0.02)


@pytest.mark.parametrize("name", ["score", "learned-score", "path", "ring"])
def test_problems_know_their_spectrum(load, name):
    problem = load("lanczos")._problem(name, True, 0)
    dense = np.asarray(problem.apply(np.eye(problem.n)))
    assert np.allclose(np.linalg.eigvalsh(dense), problem.values, atol=1e-12 * problem.norm)
    assert np.allclose(problem.apply(jnp.asarray(dense[:, 0], jnp.float32)), dense @ dense[0])


def test_the_plain_lanczos_finds_what_a_dense_solver_does(load, x64):
    peers, problem = load("_krylov_peers"), load("lanczos")._problem("path", True, 0)
    runs = peers.unrestarted(problem)
    assert len(runs) == 3
    assert all(run.complete and run.residual <= problem.tol for run in runs)
    assert all(problem.k <= run.products <= problem.n for run in runs)
    lengths = [run.products for run in runs]
    ours = peers.memjax_told(problem, lengths)
    assert [run.products for run in ours] == lengths
    assert all(run.complete and run.residual <= 1.1 * problem.tol for run in ours)
    assert all(run.residual > problem.tol for run in peers.memjax_told(problem, [10] * 3))
    # One vector sees one copy of each double eigenvalue.
    ring = load("lanczos")._problem("ring", True, 0)
    assert not any(run.complete for run in peers.unrestarted(ring))


def test_the_mixture_of_the_accuracy_table_has_its_hessian(load):
    accuracy = load("operator_accuracy")
    world = accuracy._world(16, 0)
    step = 1e-5 * np.random.default_rng(1).standard_normal(16)

    def log_density(x):
        noisy = world.variances + accuracy.SIGMA**2
        logs = -0.5 * np.sum((x - world.means) ** 2 / noisy + np.log(noisy), axis=1)
        return np.log(np.sum(np.exp(logs)))

    ahead, behind, here = (log_density(world.x + t * step) for t in (1, -1, 0))
    assert (ahead - behind) / 2 == pytest.approx(world.s @ step, rel=1e-7)
    assert ahead + behind - 2 * here == pytest.approx(step @ world.h @ step, rel=1e-3)


def test_figures_of_the_tables(load, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"method": "memjax a", "status": "ok", "products": m, "error": 1 / m} for m in (8, 16)
    ] + [
        {"method": "peer b", "status": "failed", "products": 8},
        {"method": "peer c", "status": "not installed"},
    ]
    for name, case in (("diagonals", "low-rank"), ("traces", "flat"), ("p_laplacian", "error-p-1")):
        load(name).figure([{"case": f"{name}/{case}", "rows": rows}]).savefig(tmp_path / name)
    seconds = {"minimum": 0.1, "products_per_run": 20}
    entry = {"seconds": seconds, "ratio": 1.05}
    timed = {"seconds": seconds, "baselines": {"other alone": entry}}
    runs = [
        {"method": "memjax", "status": "ok", "products": 9.0, "low": 8.0, "high": 11.0},
        {"method": "peer", "status": "incomplete", "products": 5.0, "low": 5.0, "high": 5.0},
        {"method": "absent", "status": "not installed"},
    ]
    records = [{"case": "lanczos/cost/a"} | timed, {"case": "lanczos/products/ring", "rows": runs}]
    load("lanczos").figure(records).savefig(tmp_path / "lanczos")
    load("p_laplacian").figure([{"case": "p_laplacian/flux"} | timed]).savefig(tmp_path / "cost")
    cells = [
        {"method": "f", "dtype": "float32", "kind": "relative error", "status": "ok", "value": 0.1},
        {"method": "g", "dtype": "float64", "kind": "standard errors", "status": "failed"},
    ]
    record = {"case": "operator_accuracy/d-2", "parameters": {"dimension": 2}, "rows": cells}
    load("operator_accuracy").figure([record]).savefig(tmp_path / "accuracy")
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, inside its jvp
def test_the_twin_in_pytorch_is_the_same_network_with_the_same_krylov_space(load):
    pytest.importorskip("torch")
    twin, unet, lanczos = load("_torch"), load("_unet"), load("lanczos")
    net = unet.network(True, 0)
    function, images = twin.unet(net.module, net.weights, net.points)
    ours = unet.forward(net.module, net.weights, net.points)
    np.testing.assert_allclose(twin.evaluate(function, images), ours, atol=1e-5)
    start = twin.to_torch(net.directions)
    for kind in ("jvp", "symmetric"):
        setting = lanczos._Setting(kind, True, 0)
        if kind == "jvp":
            found = np.abs(twin.arnoldi(function, images, start, lanczos.PRODUCTS))
            expected = np.abs(np.linalg.eigvals(setting.hessenberg))
        else:
            found = twin.lanczos(function, images, start, lanczos.PRODUCTS)
            expected = setting.ritz
        found, expected = np.sort(found, axis=1)[:, -4:], np.sort(expected, axis=1)[:, -4:]
        np.testing.assert_allclose(found, expected, rtol=1e-3)
