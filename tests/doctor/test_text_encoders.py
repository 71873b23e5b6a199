"""What doctor says of text encoders, without their weights."""

from __future__ import annotations

import pytest

from dbtrain.doctor.case import Case
from dbtrain.doctor.text_encoders import text_encoders
from dbtrain.models import encoder_plan
from dbtrain.models.base import Base
from tests import bases
from tests.conftest import Make


@pytest.fixture
def case(make: Make) -> Case:
    found = Case(make(model__path=str(bases.flux2_dev())))
    found.base = Base.find(found.cfg.model)
    return found


def said(case: Case, gib: float | None) -> str:
    prepare = case.cfg.prepare
    assert prepare
    settings = prepare.model_copy(update={"memory_gib": gib})
    case.cfg = case.cfg.model_copy(update={"prepare": settings})
    [found] = text_encoders(case)
    assert found.level == "ok"
    return found.what


def test_encoders_that_fit_and_encoders_that_run_layer_by_layer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_plan, "GIB", 2**20)  # so that the miniature has the sizes of a giant
    for module in ("dbtrain.doctor.text_encoders", "dbtrain.runtime.memory"):
        monkeypatch.setattr(f"{module}.GIB", 2**20)
    sizes = {
        name: 2 * weight.numel() / 2**20
        for name, weight in case.base.skeleton("text_encoder").named_parameters()
    }
    whole = f"{sum(sizes.values()):.2f} GiB"
    assert f"text_encoder {whole}: prepare loads them one at a time" in said(case, 1.0)
    # Hidden state 30 is the last that is read, so not layer 30, which is the 31st.
    unread = ("vision_tower", "multi_modal_projector", "lm_head", ".layers.30.")
    read = sum(size for name, size in sizes.items() if not any(word in name for word in unread))
    text = said(case, 0.2)
    assert f"text_encoder {whole}, more than 0.20 GiB: prepare runs them layer by layer" in text
    assert f"reads {read:.2f} GiB from disk" in text
