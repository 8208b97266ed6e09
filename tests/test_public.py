"""The public face: lazy, complete, documented, and without side effects."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "memjax"
STUBS = sorted(PACKAGE.glob("**/__init__.pyi"))


def package_name(stub: Path) -> str:
    return ".".join(stub.parent.relative_to(ROOT).parts)


def imported_names(stub: Path) -> dict[str, str]:
    """Names a stub hands on, each with the module it comes from."""
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("stub", STUBS, ids=package_name)
def test_every_public_name_is_there_and_documented(stub):
    package = importlib.import_module(package_name(stub))
    assert sorted(package.__all__) == sorted(imported_names(stub))
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{package_name(stub)}.{name} has no docstring"
        assert name in dir(package)


@pytest.mark.parametrize("stub", STUBS, ids=package_name)
def test_no_module_hides_a_name(stub):
    """Importing a submodule binds its name in the package; it must not be a function's."""
    modules = {path.stem for path in stub.parent.glob("*.py")} | {
        path.name for path in stub.parent.iterdir() if path.is_dir()
    }
    hidden = {name for name, module in imported_names(stub).items() if name in modules and module}
    assert not hidden


def test_every_public_name_stands_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for stub in STUBS:
        for name, module in imported_names(stub).items():
            if module:
                assert f"`{name}`" in page, f"{name}: run python docs/make_api.py"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout


def test_import_is_light_and_changes_nothing():
    assert python("import sys, memjax; print('jax' in sys.modules, 'numpy' in sys.modules)") == (
        "False False\n"
    )


def test_using_the_library_changes_no_jax_setting_and_touches_no_device_early():
    code = """
import jax
before = dict(jax.config.values)
import memjax, importlib
for name in memjax.__all__:
    getattr(memjax, name)
after = dict(jax.config.values)  # other packages may add settings of their own
assert {name: after[name] for name in before} == before
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert python(code) == "False\n"
