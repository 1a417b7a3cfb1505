"""The wheel: what it puts on a user's machine, and that it works there without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny import text_data

ROOT = Path(__file__).parents[2]
# The folders that pyproject.toml installs; beside them are the root's own modules.
INSTALLED = ("cache", "configs", "pipeline")
DIST_INFO = f"coldstill-{version('coldstill')}.dist-info"
DEPENDENCIES = "dependencies.pth"
# Neither the checkout nor an index of packages.
OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")


def run(*command: Any, cwd: Path) -> str:
    """Run a command outside the checkout and return its standard output."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of a folder or a source distribution."""
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, source, cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """The files of a wheel and their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since setuptools builds in place; without what may lie about in it."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    lying_about = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "caches", "runs")
    return Path(shutil.copytree(ROOT, copy, ignore=lying_about))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; what it depends on is found where it is installed for these tests.

    Through a path file, and not `--system-site-packages`: an editable install of the checkout is a path file itself,
    and Python does not follow those of folders that another one names.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    run(*pip, "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages(folder) / DEPENDENCIES).write_text("\n".join(sorted(dependencies)) + "\n")
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def test_it_holds_every_file_of_the_packages_and_nothing_else(checkout: Path, wheel: Path):
    files = [path for name in INSTALLED for path in (checkout / name).rglob("*") if path.is_file()]
    expected = {f"coldstill/{path.relative_to(checkout).as_posix()}" for path in [*files, *checkout.glob("*.py")]}
    assert {Path(name).suffix for name in expected} == {".py", ".yaml", ".css", ".jinja"}
    assert {name for name in contents(wheel) if not name.startswith(f"{DIST_INFO}/")} == expected


def test_the_wheel_of_the_source_distribution_is_the_same(checkout: Path, wheel: Path, tmp_path: Path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert contents(build(sdist, tmp_path / "wheel")) == contents(wheel)


def test_it_puts_one_name_on_a_users_machine(environment: Path):
    put = {path.name for path in site_packages(environment).iterdir()} - {DEPENDENCIES}
    assert put == {"coldstill", DIST_INFO}


def test_its_command_is_there_by_both_of_its_names(environment: Path):
    for command in (["bin/coldstill"], ["bin/python", "-m", "coldstill"]):
        program, *arguments = command
        said = run(environment / program, *arguments, "--version", cwd=environment)
        assert said == f"coldstill {version('coldstill')}\n"


RECIPE_RUN = """
import sys
from importlib.resources import files
from pathlib import Path
from coldstill import load_recipe, precompute, train
from coldstill.pipeline.demo import demo_recipe

assert demo_recipe(Path("here")).output == "here/run"
recipe = load_recipe(files("coldstill.configs") / "demo.yaml", sys.argv[1:])
precompute(recipe, show_progress=False)
train(recipe)
names = [name for name in sys.modules if name.partition(".")[0] == "coldstill"]
print(*(sys.modules[name].__file__ for name in names), sep="\\n", file=open("modules", "w"))
"""


def test_it_runs_a_shipped_recipe_without_the_checkout(environment: Path, workplace: Path, corpus: list[str]):
    text_data(workplace, corpus)  # in place of the built-in corpus, which takes long to read
    changes = ["teacher.path=teacher", "output=run", "cache=caches", "data.sequence_length=24", "train.max_steps=2"]
    changes += ["data.train.max_rows=16", "data.eval.max_rows=4"]
    changes += [f"data.{split}.{key}" for split in ("train", "eval") for key in ("path=text", "data_files=text.txt")]
    run(environment / "bin/python", "-c", RECIPE_RUN, *changes, cwd=workplace)
    assert (workplace / "run/student/config.json").is_file()
    modules = [Path(name) for name in (workplace / "modules").read_text().split()]
    assert len(modules) > 50
    assert all(module.is_relative_to(environment) for module in modules)
