"""Train with diffusers, save, audit from the command line: the duplicates are found."""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import memjax.cli.app as app
from memjax.auditing.plan import RANKING
from memjax.data.testbeds import graded
from memjax.evaluate.roc import auroc

SCRIPT = Path(__file__).with_name("train_unet2d.py")
DETECTOR = RANKING[0]


@pytest.fixture(scope="module")
def trained(torch_pipelines, tmp_path_factory):
    """The folder of the trained pipeline, kept beside the other test caches."""
    made_by = f"{SCRIPT.read_text()} {torch_pipelines.torch.__version__}"
    digest = hashlib.sha256(made_by.encode()).hexdigest()[:16]
    kept = Path(os.environ["MEMJAX_CACHE_DIR"]) / f"unet2d-{digest}"
    if not (kept / "model_index.json").is_file():
        spec = importlib.util.spec_from_file_location("train_unet2d", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = tmp_path_factory.mktemp("trained") / "pipeline"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.train(made)
        shutil.copytree(made, kept, dirs_exist_ok=True)
    return shutil.copytree(kept, tmp_path_factory.mktemp("theirs") / "my-ddpm")


@pytest.mark.slow
def test_an_audit_finds_the_duplicates(trained, tmp_path, monkeypatch):
    bed = graded(0)
    rows = np.flatnonzero(bed.multiplicity)
    np.save(tmp_path / "images.npy", bed.images[rows])
    out = tmp_path / "out"
    words = ["audit", trained, "--data", tmp_path / "images.npy", "--out", out, "--samples", "0"]
    monkeypatch.setattr(sys, "argv", ["memjax", *map(str, words), "--detector", DETECTOR])
    assert app.run() == 0

    table = pyarrow.parquet.read_table(out / "table.parquet")
    assert table.column("status").unique().to_pylist() == ["ok"]
    value = table.column(DETECTOR).to_numpy()
    multiplicity = bed.multiplicity[rows]
    chosen = (multiplicity >= 8) | (multiplicity == 1)
    area = auroc(value[chosen], multiplicity[chosen] >= 8)
    assert area.value >= 0.98, area

    model = json.loads((out / "manifest.json").read_text())["model"]
    weights = trained / "unet" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert model["name"] == "my-ddpm"
    assert model["data_std"] == pytest.approx(bed.images[rows].std(), rel=1e-4)
    origin = model["origin"]
    assert origin["folder"] == "my-ddpm"
    assert (origin["pipeline"], origin["network"]) == ("DDPMPipeline", "UNet2DModel")
    assert origin["schedule"].startswith("DDPMScheduler: DiscreteVP(beta_schedule='linear'")
    assert origin["prediction"] == "epsilon"
    assert origin["sha256"] == {"unet": digest}
    assert origin["data_std"] == "measured on the audited images"
    page = (out / "report.html").read_text()
    for shown in ("my-ddpm", "UNet2DModel", "DDPMScheduler", digest, "measured on the audited"):
        assert shown in page
