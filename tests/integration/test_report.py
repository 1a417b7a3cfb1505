"""The report command: what it writes, that it is the same every time, and what it says of what is missing."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import ERROR, FAILED, VARIANTS, write_sweep_folder
from typer.testing import Result

WriteRecipe = Callable[..., Path]
Coldstill = Callable[..., Result]
TASK_VALUES = {"teacher": 0.5, "pruned": 0.3, "recovered": 0.42}
# What a page could ask a network for.
FOREIGN = re.compile(r'(?:src|href|action|poster|data)="(?!#|data:)|url\((?!#)|@import|<script|<link rel="stylesheet"')


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_whole_run_becomes_one_page_and_its_figures_the_same_every_time(
    coldstill: Coldstill, whole_run: Path, tmp_path: Path
):
    said = coldstill("report", whole_run, "--output", tmp_path / "first").stdout
    written = bytes_of(tmp_path / "first")
    page = written["report.html"].decode()
    names = re.findall(r'<figure id="figure-([\w-]+)">', page)
    assert f"report     {tmp_path / 'first' / 'report.html'}" in said
    assert f"figures    {len(names)}, each as SVG and PNG" in said
    assert set(written) == {"report.html", *(f"figures/{name}.{kind}" for name in names for kind in ("svg", "png"))}
    assert {
        "gap-closed",
        "loss-terms",
        "loss-hidden",
        "loss-dynamics",
        "perplexity-over-epochs",
        "divergence-over-epochs",
        "layer-map",
        "similarity-before",
        "similarity-after",
        "projector-spectrum",
        "pairs-cosine",
    } == set(names)
    assert FOREIGN.findall(page) == []
    coldstill("report", whole_run.parent / "recipe.yaml", "--output", tmp_path / "second")
    assert bytes_of(tmp_path / "second") == written


def test_the_tables_hold_the_numbers_of_the_records(coldstill: Coldstill, whole_run: Path, tmp_path: Path):
    coldstill("report", whole_run, "--output", tmp_path)
    page = (tmp_path / "report.html").read_text()
    models = json.loads((whole_run / "evaluation" / "results.json").read_text())["models"]
    summary = json.loads((whole_run / "train.json").read_text())["summary"]
    stage_one = json.loads((whole_run / "precompute" / "provenance.json").read_text())["precompute"]
    for name in ("teacher", "pruned", "recovered"):
        row = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', page, re.DOTALL)
        assert row is not None
        cells = re.findall(r"<td>(?:<strong>)?(.*?)(?:</strong>)?</td>", row[1])
        quality = models[name]
        assert cells == [
            f"{quality['loss']:.4f}",
            f"{quality['perplexity']:,.2f}" if quality["perplexity"] < 1000 else f"{quality['perplexity']:,.0f}",
            f"{quality['kl']:.4f}",
            f"{100 * quality['agreement']:.1f}%",
        ]
    assert f"{summary['tokens_per_s']:,.0f} tokens/s" in page
    assert f"{stage_one['computed_tokens'] / stage_one['seconds']:,.0f} tokens/s" in page


def test_tasks_are_shown_with_their_standard_errors(coldstill: Coldstill, whole_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    record = run / "evaluation" / "results.json"
    found = json.loads(record.read_text())
    values = {name: {"value": value, "stderr": 0.021} for name, value in TASK_VALUES.items()}
    kept = {name: {"value": value / 0.5, "stderr": 0.03} for name, value in TASK_VALUES.items() if name != "teacher"}
    task = {"models": values, "retention": kept, "gap_closed": {"value": 0.6, "stderr": 0.11}}
    found["tasks"] = {"arc_easy": {**task, "metric": "acc_norm", "higher_is_better": True, "num_samples": 200}}
    found["task_average"] = task
    record.write_text(json.dumps(found))
    found = json.loads(coldstill("report", run, "--json").stdout)
    assert "recovery" not in found["missing"]
    page = (run / "report" / "report.html").read_text()
    assert "arc_easy, acc_norm" in page
    assert "42.0% ± 2.1%" in page
    assert "84.0% ± 3.0%" in page
    assert "60.0% ± 11.0%" in page
    assert "arc_easy: 60 ± 11" in (run / "report" / "figures" / "gap-closed.svg").read_text()


def test_a_bare_run_says_what_is_missing_and_how_to_get_it(
    coldstill: Coldstill, write_recipe: WriteRecipe, workplace: Path
):
    recipe = write_recipe(loss__gamma=0, targets__hidden={"blocks": "none"})
    for stage in ("precompute", "train"):
        coldstill(stage, recipe)
    run = workplace / "run"
    found = json.loads(coldstill("report", run, "--json").stdout)
    assert found["figures"] == ["loss-terms", "layer-map"]
    reasons = {section: " ".join(texts) for section, texts in found["missing"].items()}
    assert "run: coldstill evaluate" in reasons["recovery"]
    assert "train.eval_strategy=epoch" in reasons["epochs"]
    assert "loss.gamma and loss.delta are 0" in reasons["layers"]
    assert "run: coldstill precompute" in reasons["similarity"]
    assert "set loss.gamma above 0" in reasons["projectors"]
    page = (run / "report" / "report.html").read_text()
    assert all(text.partition("'")[0] in page for texts in found["missing"].values() for text in texts)
    assert "3 removed" in (run / "report" / "figures" / "layer-map.svg").read_text()
    # Without the store there is less to draw, and no figure of the earlier report stays.
    shutil.rmtree(workplace / "caches")
    assert "layers" in json.loads(coldstill("report", run, "--json").stdout)["missing"]
    assert not (run / "report" / "figures" / "layer-map.svg").exists()


def test_an_evaluation_older_than_the_student_counts_as_none(coldstill: Coldstill, whole_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    record = run / "evaluation" / "provenance.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "written_at": "2020-01-01T00:00:00+00:00"}))
    assert json.loads(coldstill("report", run, "--json").stdout)["missing"]["recovery"] == [
        "This run is not judged yet, or was trained again since; run: coldstill evaluate"
    ]


def test_a_sweep_is_reported_with_its_failures(coldstill: Coldstill, whole_run: Path, tmp_path: Path):
    write_sweep_folder(tmp_path, whole_run)
    found = json.loads(coldstill("report", tmp_path, "--json").stdout)
    assert found["figures"][:3] == ["variants-perplexity", "variants-kl", "variants-agreement"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert ERROR.replace("'", "&#39;") in page
    assert "(failed)" in (tmp_path / "report" / "figures" / "variants-kl.svg").read_text()
    rows = re.findall(r'<th scope="row">(.*?)</th>\s*<td>(.*?)</td>', page, re.DOTALL)
    assert (FAILED, "failed") in rows
    assert all(f"<summary>{name}</summary>" in page for name in VARIANTS)


def test_a_sweep_says_how_near_each_students_blocks_come_to_the_teachers(
    coldstill: Coldstill, whole_run: Path, tmp_path: Path
):
    write_sweep_folder(tmp_path, whole_run)
    # One that cannot be compared is named with its reason, and the others are drawn all the same.
    (tmp_path / "runs" / "31ab" / "projectors.safetensors").unlink()
    found = json.loads(coldstill("report", tmp_path, "--json").stdout)
    (reason,) = found["missing"]["similarity"]
    assert reason.startswith("Blocks of 'all' could not be compared: the projectors of the run are gone")
    drawn = (tmp_path / "report" / "figures" / "nearest-blocks-cka.svg").read_text()
    for name, key in (("task", "01ab"), ("task+hidden", "21ab")):
        kept = json.loads((tmp_path / "runs" / key / "evaluation" / "similarity.json").read_text())["similarity"]
        nearest = [max(column) for column in zip(*kept["recovered"], strict=True)]
        assert f"{name} from {nearest[0]:.4g} to {nearest[-1]:.4g}" in drawn
    before = [max(column) for column in zip(*kept["pruned"], strict=True)]
    assert f"before training from {before[0]:.4g} to {before[-1]:.4g}" in drawn


def test_names_from_records_are_text_and_never_markup(coldstill: Coldstill, whole_run: Path, tmp_path: Path):
    write_sweep_folder(tmp_path, whole_run)
    file = tmp_path / "sweep.json"
    file.write_text(file.read_text().replace("task+logits", "<b>$x_1$ & co</b>"))
    coldstill("report", tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<b>" not in page
    drawn = (tmp_path / "report" / "figures" / "variants-kl.svg").read_text()
    assert '<th scope="row">&lt;b&gt;$x_1$ &amp; co&lt;/b&gt;</th>' in page
    assert ">&lt;b&gt;$x_1$ &amp; co&lt;/b&gt;</text>" in drawn


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "holds neither a run nor a sweep; a run's folder is what its recipe names as `output`"),
        (lambda folder: (folder / "sweep.json").write_text("{"), "sweep.json is damaged"),
        (lambda folder: (folder / "train.json").write_text("{}"), "is not complete: no student/config.json; run"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_one_line(
    coldstill: Coldstill, tmp_path: Path, make: Callable[[Path], Any], expected: str
):
    make(tmp_path)
    result = coldstill("report", tmp_path, expect=2)
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(coldstill: Coldstill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = coldstill("report", tmp_path, expect=2)
    assert "pip install 'coldstill[report]'" in result.stderr
