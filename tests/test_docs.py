"""The code in docs/: it runs as it stands there, and says what the page says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models_page
from benchmarks.marked_pages import filled
from mamba_attn.attribution import catalogue
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import _registered

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str) -> dict[str, Any]:
    """The names that a page's Python blocks leave behind, run one after the other."""
    text = (DOCS / page).read_text()
    namespace: dict[str, Any] = {"__name__": page}
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(DOCS / page), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def family() -> Iterator[dict[str, Any]]:
    before = list(_registered)
    try:
        yield run("adding_a_family.md")
    finally:
        _registered[:] = before


def test_the_worked_example_obeys_the_laws(family: dict[str, Any]) -> None:
    assert family["report"].matrix_error <= 1e-5
    model = family["model"].double()
    report = check_adapter(model, family["images"].double(), tolerance=1e-11)
    assert [layer.name for layer in report.layers] == ["mixers.0", "mixers.1"]
    model.float()


def test_the_worked_examples_matrices_and_maps(family: dict[str, Any]) -> None:
    assert family["heat"].shape == (2, 1, 48, 32)
    matrix = family["trace"]["mixers.0"].attention()
    assert matrix.shape == (2, 96, 96)
    quarter = torch.stack(torch.meshgrid(torch.arange(12) % 2, torch.arange(8) % 2, indexing="ij"), -1).view(96, 2)
    same = (quarter[:, None] == quarter[None]).all(-1)
    assert not matrix[:, ~same].any()
    assert bool((matrix[:, same] != 0).any())


def test_swapping_two_quarters_is_found(family: dict[str, Any]) -> None:
    class Swapped(family["EfficientVMambaAdapter"]):
        def project(self, module: Any, x: Any, **kwargs: Any) -> Any:
            record = super().project(module, x, **kwargs)
            return record.replace(read_order=record.read_order[[1, 0, 2, 3]])

    with pytest.raises(LawError):
        check_adapter(family["model"], family["images"], adapters=[Swapped()])


def test_what_the_worked_example_refuses(family: dict[str, Any]) -> None:
    model, adapter = family["Model"]().eval(), family["EfficientVMambaAdapter"]()
    with pytest.raises(UnsupportedModelError, match="pads odd grids; 11x8"):
        check_adapter(model, torch.randn(1, 3, 44, 32), adapters=[adapter])
    model.mixers[1].step_size = 3
    with pytest.raises(UnsupportedModelError, match=r"mixers\.1.*step_size is 3"):
        check_adapter(model, family["images"], adapters=[adapter])


def test_the_adapter_has_about_forty_lines() -> None:
    text = (DOCS / "adding_a_family.md").read_text()
    adapter = text[text.index("class EfficientVMambaAdapter") : text.index("What each method is for")]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 50


def test_comparing_in_code() -> None:
    found = run("comparing.md")
    assert found["cell"] == 8
    assert 0 <= found["positive"] <= 80
    assert 0 <= found["negative"] <= 80


def test_the_quickstart_in_code() -> None:
    found = run("quickstart.md")
    assert found["heat"].shape == (1, 1, 128, 128)
    torch.testing.assert_close(found["row"], found["matrix"][:, 7], rtol=1e-4, atol=1e-7)


def test_the_worked_method_is_its_definition() -> None:
    found = run("adding_a_method.md")
    assert found["heat"].shape == (2, 1, 64, 96)
    assert found["last"].shape[0] == 2
    with pytest.raises(ValueError, match="this method reads no token's row; leave pixel out"):
        found["ReadByAll"](found["model"]).attribute(found["images"], pixel=(3, 4))


def test_the_worked_figure_draws_what_is_read() -> None:
    found = run("adding_a_figure.md")
    first, last = found["figure"].data
    assert [first.name, last.name] == [layer.name for layer in found["trace"].layers]
    matrix = found["trace"].layers[0].attention()[0].abs()
    assert first.y[0] == pytest.approx(float(matrix.diagonal().sum() / matrix.sum()), rel=1e-4)
    assert sum(first.y) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected one name per matrix, got 1 matrices, 0 names"):
        found["by_distance"]([matrix], [])


def test_the_first_page_in_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run("index.md")["answer"].best(3)) == 3
    assert (tmp_path / "maps").is_dir()


def test_every_method_that_folds_attention_is_on_the_page_about_folding() -> None:
    text = (DOCS / "aggregation.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert named <= set(catalogue.METHODS)
    assert {name for name, entry in catalogue.METHODS.items() if entry.made_of != catalogue.ANY} == named


def test_maps_of_one_pass_in_code() -> None:
    assert [maps.shape for maps in run("how_it_works.md")["maps"]] == [(2, 1, 128, 128)] * 3


def test_text_in_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("text.md")
    assert found["heat"].shape == (1, len(found["words"]))
    assert found["words"][int(found["heat"][0, :-1].argmax())] in (" charming", " hilarious")
    assert "<span" in (tmp_path / "strip.html").read_text()


def test_every_recipe_is_run_here() -> None:
    here = Path(__file__).read_text()
    for page in (DOCS / "how-to").glob("*.md"):
        if page.name == "index.md":  # a list of the others
            continue
        assert f'run("how-to/{page.name}")' in here, page.name


def test_a_model_of_ones_own_in_code() -> None:
    found = run("how-to/own_model.md")
    assert found["heat"].shape == (64, 64)
    assert {name for name, _ in found["answer"].best(3)} == {"benign", "malignant", "neither"}


def test_the_tables_of_models_are_those_of_the_results() -> None:
    results = json.loads(models_page.RESULTS.read_text())
    assert filled(models_page.PAGE.read_text(), models_page.PARTS, results) == models_page.PAGE.read_text()
    broken = {"details": {"rows": [{"repository": "a/b", "class": "C", "variant": "", "refused": "another"}]}}
    assert len(models_page.classes(broken).splitlines()) == 2


def test_logging_maps_in_a_training_loop_changes_nothing_of_the_model(tmp_path: Path) -> None:
    found = run("how-to/training_loop.md")
    names = sorted(path.name for path in found["folder"].glob("*.png"))
    assert names == [f"image{n}_step{step:06d}.png" for n in (0, 1) for step in (0, 2)]

    class Writer:
        def __init__(self) -> None:
            self.images: list[tuple[str, tuple[int, ...], int, str]] = []

        def add_image(self, tag: str, array: Any, step: int, dataformats: str) -> None:
            self.images.append((tag, array.shape, step, dataformats))

    model = found["model"].train()
    model.norm_f.eval()  # a part that is frozen
    x = torch.rand(2, 3, 64, 64)
    model(x).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, needed = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    random, writer = torch.get_rng_state(), Writer()
    found["log_maps"](model, x, x, 7, tmp_path, writer)
    assert writer.images == [(f"maps/{n}", (64, 64, 3), 7, "HWC") for n in (0, 1)]
    for name, parameter in model.named_parameters():
        before = gradients[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or (parameter.grad is not None and torch.equal(parameter.grad, before))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needed
    assert torch.equal(torch.get_rng_state(), random)


def test_a_segmentations_pixel_in_code() -> None:
    found = run("how-to/segmentation_pixel.md")
    assert found["one"].shape == found["each"].shape == found["region"].shape == found["read"].shape == (2, 1, 64, 96)
    torch.testing.assert_close(found["each"][0], found["one"][0])
    assert not torch.allclose(found["each"][1], found["one"][1])
    assert not torch.allclose(found["read"], found["one"])


def test_a_loaders_maps_in_code() -> None:
    found = run("how-to/dataloader_to_npz.md")
    maps = found["maps"]
    assert maps["labels"].tolist() == [0, 1, 2, 3, 4]
    images = torch.stack([image for image, _ in found["loader"].dataset])
    for name, method in found["methods"].items():
        truth = method.attribute(images, list(range(5)))[:, 0]
        torch.testing.assert_close(torch.from_numpy(maps[name]), truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()))


def test_a_unet_of_mamba_blocks_in_code() -> None:
    found = run("how-to/unet_of_mamba_blocks.md")
    for maps in (found["read"], found["drives"]):
        assert maps.shape == (2, 1, 64, 96)
        assert maps.isfinite().all()
        assert maps.std() > 0
    assert [layer.layout.grid for layer in found["record"].layers] == [(16, 24), (8, 12), (16, 24)]
    place = divmod(int(found["read"][0, 0].argmax()), 96)
    assert place[0] // 8 <= 30 // 8  # a causal scan reads what comes before the pixel's token
    drawn = LoadedModel(found["model"], Transform((64, 96)), layout=found["layout"])
    with pytest.warns(UserWarning, match="attention_rollout is left out: rollout from a grid of 8x12 to one of 16x24"):
        (answer,) = found["mamba_attn"].explain(drawn, torch.rand(1, 3, 64, 96))
    assert list(answer.maps) == ["raw_attention"]
    with pytest.raises(UnsupportedModelError, match="name the layers of one stage"):
        found["mamba_attn"].explain(drawn, torch.rand(1, 3, 64, 96), methods="attention_rollout")


def test_patches_made_by_einops_in_code() -> None:
    found = run("how-to/einops_patches.md")
    assert [maps.shape for maps in found["maps"]] == [(2, 1, 64, 96)] * 3
    assert found["changed"].tolist() == [found["expected"]] == [2 * 12 + 5]


def test_large_runs_by_a_scheduler_of_ones_own(tmp_path: Path) -> None:
    """With one that does everything at once; tests/analytics/test_schedulers.py has real ones."""
    from tests.analytics import cases

    class Now:
        def map_array(self, call: Any, numbers: list[int]) -> list[Any]:
            return [type("Job", (), {"result": staticmethod(lambda number=number: call(number))}) for number in numbers]

    request = cases.request(cases.folder_of(tmp_path, 1), part=2)
    found = run("how-to/large_runs.md")["with_submitit"](Now(), request, str(tmp_path / "store"))
    assert (found.new, found.counted) == (0, 3)
