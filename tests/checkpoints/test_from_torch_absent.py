"""What happens where PyTorch is not installed: one line, and only when it is asked for."""

import sys

import pytest

import memjax as mj
from memjax._core.errors import MissingExtraError
from memjax.diffusion.schedule import DiscreteVP


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'memjax\[torch\]'") as raised:
        mj.from_torch(object(), (), schedule=DiscreteVP(), prediction="epsilon", data_std=1.0)
    assert "\n" not in str(raised.value)
