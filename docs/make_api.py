"""Write docs/api.md: every public name with the first sentence of its docstring."""

import importlib
from pathlib import Path

import memjax

FOLDERS = (
    "densities",
    "linalg",
    "calculus",
    "diffusion",
    "networks",
    "checkpoints",
    "training",
    "data",
    "evaluate",
    "detect",
    "localize",
    "extract",
    "mitigate",
    "auditing",
    "report",
)


def first_sentence(value: object) -> str:
    """The summary of a docstring, fit for a table."""
    text = " ".join((value.__doc__ or "").strip().split("\n\n")[0].split())
    return text.replace("|", "\\|")


def section(name: str) -> list[str]:
    """Lines of one folder's section."""
    package = importlib.import_module(f"memjax.{name}")
    lines = [
        f"## `memjax.{name}`",
        "",
        (package.__doc__ or "").strip(),
        "",
        "| name | |",
        "|---|---|",
    ]
    for public in package.__all__:
        marker = " *" if public in memjax.__all__ else ""
        lines.append(f"| `{public}`{marker} | {first_sentence(getattr(package, public))} |")
    return [*lines, ""]


def main() -> None:
    """Write the page beside this script."""
    core = ["| name | |", "|---|---|"]
    for public in ("Cost", "Status", "check_backend"):
        core.append(f"| `{public}` | {first_sentence(getattr(memjax, public))} |")
    lines = [
        "# Public names",
        "",
        "Written by `python docs/make_api.py`. Names with a star are also at the top level:",
        "`import memjax as mj; mj.linearize(...)`. Formulas, units, errors, costs and sources",
        "are in the docstrings.",
        "",
        *core,
        "",
    ]
    for name in FOLDERS:
        lines += section(name)
    (Path(__file__).parent / "api.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
