"""Sampling row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from dtune.errors import ConfigError
from dtune.evaluate.generation import RowSampling, sampling_processors, until_stop
from dtune.evaluate.schema import SamplingConfig

CPU = torch.device("cpu")
DRAWS = 20_000


@dataclass(frozen=True)
class Asked:
    number: int
    input_ids: list[int] = field(default_factory=lambda: [1])


def draws(sampling: SamplingConfig, logits: torch.Tensor) -> torch.Tensor:
    """Share of each token among many draws."""
    sampler = RowSampling(sampling, [0], CPU)
    ids = torch.zeros(1, 1, dtype=torch.long)
    tokens = [int(sampler(ids, logits[None].clone()).argmax()) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / DRAWS


def test_what_is_drawn_has_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    for temperature in (0.5, 2.0):
        expected = torch.softmax(logits / temperature, dim=0)
        found = draws(SamplingConfig(temperature=temperature), logits)
        # Five standard deviations of a share.
        limit = 5 * (expected * (1 - expected) / DRAWS).sqrt()
        assert ((found - expected).abs() <= limit).all(), found
        # The same draws are no draws of another temperature.
        other = torch.softmax(logits, dim=0)
        assert not ((found - other).abs() <= limit).all()


def test_top_p_leaves_the_likeliest_tokens_only() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = draws(SamplingConfig(temperature=1.0, top_p=0.7), logits)
    assert found[2:].tolist() == [0.0, 0.0]
    assert found[0] == pytest.approx(0.5 / 0.8, abs=0.02)


def test_greedy_needs_no_processor_and_rows_draw_by_their_number() -> None:
    assert sampling_processors(SamplingConfig(), [Asked(0)], CPU) == []
    sampling = SamplingConfig(temperature=1.0)
    logits, ids = torch.zeros(2, 50), torch.zeros(2, 1, dtype=torch.long)
    together = RowSampling(sampling, [3, 4], CPU)(ids, logits.clone())
    alone = RowSampling(sampling, [4], CPU)(ids[:1], logits[:1].clone())
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_an_answer_ends_before_the_first_stop() -> None:
    assert until_stop([5, 6, 2, 7, 2], {2, 9}) == ([5, 6], True)
    assert until_stop([5, 6], {2}) == ([5, 6], False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 1.0, "top_p": 0.0},
        {"seed": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        SamplingConfig(**wrong)  # type: ignore[arg-type]
