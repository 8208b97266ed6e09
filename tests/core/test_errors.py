"""Errors: one line, catchable by the class a caller expects; optional packages by extra."""

import pytest

from memjax._core.errors import (
    CheckpointError,
    InputError,
    MemjaxError,
    MissingExtraError,
    require,
)


def test_errors_are_catchable_as_the_builtin_a_caller_expects():
    assert issubclass(InputError, ValueError)
    assert issubclass(CheckpointError, InputError)
    assert issubclass(MissingExtraError, ImportError)
    assert all(issubclass(e, MemjaxError) for e in (InputError, CheckpointError, MissingExtraError))


def test_require_returns_the_module():
    import json.decoder

    assert require("json.decoder", "audit") is json.decoder


@pytest.mark.parametrize("module", ["memjax_no_such_package", "memjax_no_such_package.inner"])
def test_missing_package_names_the_extra(module):
    with pytest.raises(MissingExtraError) as caught:
        require(module, "audit")
    message = str(caught.value)
    assert "'memjax_no_such_package'" in message
    assert "pip install 'memjax[audit]'" in message
    assert "\n" not in message


def test_a_module_broken_inside_is_another_fault(tmp_path, monkeypatch):
    (tmp_path / "memjax_broken_module.py").write_text("import memjax_no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="memjax_no_such_dependency") as caught:
        require("memjax_broken_module", "audit")
    assert not isinstance(caught.value, MissingExtraError)
