"""Published figures stand beside ours only where weights and images are the paper's."""

import pytest

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.samples import Data
from mamba_attn.evaluation.intervals import Interval
from mamba_attn.evaluation.page import _published
from mamba_attn.evaluation.specs import Model
from mamba_attn.evaluation.summary import Figure, Table
from mamba_attn.evaluation.tables import PERTURBATION, SEGMENTATION, beside
from mamba_attn.models import create, transform


class Empty(Data):
    _picture = _regions = None


IMAGENET = Empty("val", "val", [], classes=[f"n{index:08d}" for index in range(1000)])
SEGMENTS = Empty("gtsegs_ijcv.mat", "gtsegs_ijcv.mat-123", [])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    model = create("vim_micro", depth=1, num_classes=1000)
    subject = LoadedModel(model, transform("vim_micro"), [str(index) for index in range(1000)], name="vim_small")
    monkeypatch.setattr(Model, "subject", subject)


def test_only_there():
    official = Model("vim_small", "w.pth")
    assert beside(Table(IMAGENET, official, 5)) is PERTURBATION
    assert beside(Table(SEGMENTS, official, 5)) is SEGMENTATION
    some = Empty("val", "val", [], classes=IMAGENET.classes[:10])
    assert beside(Table(some, official, 5)) == ()
    assert beside(Table(IMAGENET, Model("vim_tiny", "w.pth"), 5)) == ()
    assert beside(Table(IMAGENET, Model("vim_small"), 5)) == ()
    assert _published([Table(some, official, 5)]) == []


def test_every_variant_of_ours_has_a_row():
    table = Table(IMAGENET, Model("vim_small", "official"), 5)
    value = Figure(Interval(12.25, 12.0, (12.0, 13.0), 13.0), 5)
    names = ("raw_attention", "raw_attention:convention=hidden_mamba")
    table.figures = {"positive_auc_target": dict.fromkeys(names, value)}
    ((_, header, rows),) = _published([table])
    cells = [cell for row in rows for cell in row]
    assert cells.count("12.25") == 2
    assert "17.268" in cells
    assert {row[2] for row in rows} >= set(names)
    assert len(rows) == 6 + 1
    assert {len(row) for row in rows} == {len(header)}


def test_the_tables_are_those_of_the_paper():
    ours = {row.ours: row.figures for row in PERTURBATION if row.model == "Vim-S"}
    assert ours["mamba_attribution"] == {"positive_auc_target": 16.619, "negative_auc_target": 39.632}
    assert len(SEGMENTATION) == 7
    assert {"mamba_lrp": 49.98}.items() <= {row.ours: row.figures["miou"] for row in SEGMENTATION}.items()
