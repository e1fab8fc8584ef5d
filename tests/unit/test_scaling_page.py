"""The page about scaling is what was counted and what ``dtune plan`` predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.scaling.page import render
from benchmarks.scaling.predict import GPUS, WORKS, Prediction, predict
from benchmarks.scaling.run import PAGE, counted, predictions


def test_the_page_is_written_from_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(counted(), predictions())


def test_every_work_is_predicted_on_every_number_of_gpus() -> None:
    found = predictions()
    assert {(one.work, one.gpus) for one in found} == {
        (work.name, gpus) for work in WORKS for gpus in GPUS
    }
    # Something fits wherever there are GPUs enough.
    for work in WORKS:
        assert any(one.fits for one in found if (one.work, one.gpus) == (work.name, GPUS[-1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="written where there is no GPU")
@pytest.mark.parametrize("gpus", [8, 1024])
def test_predictions_are_what_is_planned_now(gpus: int) -> None:
    found = [one for one in predictions() if (one.work, one.gpus) == (WORKS[0].name, gpus)]
    now = list(predict(WORKS[0], gpus))
    assert list(map(rounded, now)) == list(map(rounded, found))


def rounded(one: Prediction) -> Prediction:
    """To nine digits of seconds."""
    names = ("passes", "optimizer", "sending", "exposed")
    return replace(one, **{name: round(vars(one)[name], 9) for name in names})
