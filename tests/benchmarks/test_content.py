import pytest
import torch

from benchmarks import content, content_page, zoo


@pytest.fixture(params=["vim_micro", "vmamba_micro"])
def model(request):
    small = {"vim_micro": {"embed_dim": 16, "depth": 2}, "vmamba_micro": {"dims": 8}}[request.param]
    return zoo.create(request.param, num_classes=5, image_size=32, **small)


@torch.no_grad()
def test_without_convolutions_and_far_attention_a_token_reaches_no_other(model):
    """With no steps back and the own tap alone, what a mixer answers of a token depends on nothing else."""
    mixer = next(module for module in model.modules() if type(module).__name__ in ("VimMixer", "SS2D"))
    seen = []
    handle = mixer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    random = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 32, 32, generator=random)
    reached = {}
    for blocks in ((), (content.own_tap(model), content.knockout(model, beyond=0))):
        entered = [block.__enter__() for block in blocks]
        assert len(entered) == len(blocks)
        model(image)
        changed = image.clone()
        changed[..., :8, :8] += 1  # the first patch of Vim, the first tokens of VMamba
        model(changed)
        for block in reversed(blocks):
            block.__exit__(None, None, None)
        (x, y), (other_x, other_y) = seen[-2:]
        moved = [(one - two).abs().flatten(1, -2).amax(-1) > 1e-7 for one, two in ((x, other_x), (y, other_y))]
        reached[len(blocks)] = bool((moved[1] & ~moved[0]).any())
    handle.remove()
    assert reached == {0: True, 2: False}


def test_the_weights_are_put_back_whatever_happens(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = []

    def interrupted():
        with content.own_tap(model):
            changed.extend(name for name, value in model.state_dict().items() if not torch.equal(value, before[name]))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert changed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_intervention_is_measured_and_written_on_the_page(model, tmp_path, monkeypatch):
    """Of a model whose matrices are replaced by its own: nothing changes; and the page has a row for every layer."""
    model.double()  # random weights attend weakly
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    own = content.matrices(model, images[:1])
    names = list(own)
    plain = model(images[:1])
    found = {}
    for what, block in content.changes(model, own, own):
        with block, torch.no_grad():
            found[what] = (model(images[:1]) - plain).abs().max().item()
    assert max(found[f"{kind}|{where}"] for kind in ("mean", "another") for where in (*names, "all layers")) < 1e-12
    assert min(found[f"{kind}|all layers"] for kind in ("none", "within 0", "own tap")) > 1e-9
    store = content.Answers(tmp_path / "answers.jsonl")
    for batch in range(3):
        store.add({"batch": batch, "labels": [0, 1], "donor": batch % 2, "control": 1e-6, "own": [0, 1],
                   **{what: [0, 0] for what in found}})  # fmt: skip
    summary = content.summary(content.Answers(tmp_path / "answers.jsonl"))
    assert summary["changed"]["mean"]["all layers"]["change"][0] == -50
    monkeypatch.setattr(content_page, "_details", lambda: {"models": {"small": summary}})
    assert all(f"| {name} |" in content_page.worth({}) for name in names)
    assert "reading each token alone: -50.0" in content_page.within({})


def test_of_several_seeds_the_seeds_are_the_units(monkeypatch):
    seeds = [
        {"weights": f"{seed}", "images": 8, "own": [60.0 + seed, None, None],
         "changed": {"none": {"a layer": {"change": [0.0, None, None]}, "all layers": {"change": [change, -9.0, 9.0]}}}}
        for seed, change in enumerate((-1.0, -2.0, -3.0))
    ]  # fmt: skip
    found = content.over_seeds(seeds)
    assert found["own"][0] == 61
    half = 4.302652729911275 / 3**0.5  # Student's, of two degrees of freedom
    assert found["changed"] == {"none": [-2.0, round(-2 - half, 2), round(-2 + half, 2)]}
    monkeypatch.setattr(content_page, "_details", lambda: {"orders": {"raster": found, "random": found}})
    assert "| in all layers | raster | random |" in content_page.in_orders({})
    assert "| none (D u alone) | -2.0 [-4.5, 0.5] | -2.0 [-4.5, 0.5] |" in content_page.in_orders({})
