"""What is installed, and what `import coldstill` offers: said in pyproject.toml and in the root's `__init__`."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import coldstill

ROOT = Path(__file__).parents[2]
INIT = ast.parse((ROOT / "__init__.py").read_text())


def assigned(name: str) -> ast.expr:
    """What the root's `__init__` assigns to a name."""
    assignments = [node for node in INIT.body if isinstance(node, ast.Assign)]
    (found,) = (node.value for node in assignments if ast.unparse(node.targets[0]) == name)
    return found


def imported_for_types() -> dict[str, str]:
    """The names that the root's `__init__` imports for type checkers, and the module of each."""
    (block,) = (node for node in INIT.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.name: str(node.module) for node in block.body for alias in node.names}


def test_every_package_of_the_checkout_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT).parts for file in ROOT.rglob("__init__.py")]
    # Not those of an environment in the checkout, or of what was built there.
    own = [parts for parts in folders if not parts or not (parts[0].startswith(".") or parts[0] == "build")]
    assert sorted(listed) == sorted(".".join(("coldstill", *parts)) for parts in own)


def test_the_public_names_are_the_same_to_people_to_type_checkers_and_at_run_time():
    loaded_from = {name: f"coldstill.{module}" for name, module in ast.literal_eval(assigned("_MODULES")).items()}
    assert loaded_from == imported_for_types()
    assert sorted(loaded_from) == ast.literal_eval(assigned("__all__")) == coldstill.__all__


def test_every_public_name_is_there():
    for name, module in imported_for_types().items():
        assert getattr(coldstill, name) is getattr(importlib.import_module(module), name)
        assert name in dir(coldstill)


def test_a_name_that_is_not_public_is_an_attribute_error():
    assert not hasattr(coldstill, "Coldstil")


def test_to_import_it_loads_neither_torch_nor_transformers():
    code = "import sys, coldstill; dir(coldstill); print({'torch', 'transformers', 'zarr'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
