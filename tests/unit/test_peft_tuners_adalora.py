"""AdaLoRA: its budget is peft's, on one process and on two, through checkpoints and files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from dtune.errors import ConfigError
from dtune.peft.adalora import Adalora
from dtune.peft.schema.adalora import AdaloraConfig
from tests.contracts.small_models import (
    build_on_meta,
    load_base,
    materialize,
    save_base,
    token_ids,
)
from tests.distributed.participants import Seen
from tests.distributed.pool import Pool
from tests.distributed.training import Setup
from tests.integration.runs import exported

STEPS = 12
OPTIONS = (("rank", 4), ("final_rank", 2), ("initial_share", 0.2), ("final_share", 0.4))
CASES = "tests.distributed.participants"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


def peft_twin(base: Path, method: Adalora) -> peft.PeftModel:
    """HF peft's model with the same initial values, for a run of as many steps."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=32,
        tinit=2,
        tfinal=4,
        total_step=STEPS,
        task_type="CAUSAL_LM",
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "up_proj",
            "gate_proj",
            "down_proj",
        ],
    )
    twin = peft.get_peft_model(load_base(base), config)
    values = method.initial(0)
    for name, parameter in twin.named_parameters():
        ours = name.removeprefix("base_model.model.")
        if ours in values:
            parameter.data = values[ours].clone()
    return twin


def test_steps_are_those_of_peft(llama: Path) -> None:
    """Loss with penalty, importance, and which ranks go when: bit for bit over a whole run."""
    model, spec = build_on_meta(llama)
    method = Adalora(AdaloraConfig(**dict(OPTIONS)))
    method.inject(model, spec)
    materialize(model, method, llama)
    twin = peft_twin(llama, method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {f"base_model.model.{name}": name for name in trained}
    pairs = [(trained[theirs[n]], p) for n, p in twin.named_parameters() if n in theirs]
    assert len(pairs) == len(trained) == 3 * 14
    ours = torch.optim.AdamW([p for p, _ in pairs], lr=0.05)
    other = torch.optim.AdamW([p for _, p in pairs], lr=0.05)
    ids, ranks = token_ids(), []
    for step in range(1, STEPS + 1):
        loss = model(ids, labels=ids).loss + method.penalty()
        loss.backward()
        method.before_step()
        ours.step()
        ours.zero_grad()
        method.after_step(step, STEPS)
        output = twin(ids, labels=ids)
        output.loss.backward()
        other.step()
        twin.base_model.update_and_allocate(step)
        other.zero_grad()
        assert torch.equal(loss, output.loss), step
        assert all(torch.equal(one, two) for one, two in pairs), step
        ranks.append(sum(int((p != 0).sum()) for n, p in trained.items() if "lora_E" in n))
    assert ranks[0] == 4 * 14
    assert ranks[-1] == 2 * 14
    assert sorted(ranks, reverse=True) == ranks


def setup(tmp: Path, engine: str, **options: object) -> Setup:
    chosen = {**dict(OPTIONS), **options}
    return Setup(
        "dtune://tiny",
        engine=engine,
        peft="adalora",
        peft_options=tuple(chosen.items()),
        steps=STEPS,
    )


def test_two_ranks_step_as_one_and_resume_bit_for_bit(two_ranks: Pool, tmp_path: Path) -> None:
    run = f"{CASES}:train_and_resume"
    # In the middle of taking ranks away.
    single, _ = two_ranks.run(run, setup=setup(tmp_path, "single"), at=5)
    ddp: list[Seen] = two_ranks.run(run, setup=setup(tmp_path, "ddp"), at=5)
    targets = 4 * 7
    for seen in (single, *ddp):
        assert seen.resumed == seen.curve[5:]
        assert seen.equal
        assert seen.ranks == 2 * targets
    assert ddp[0].curve == ddp[1].curve
    # Sums of fp32 in another order; a penalty that counts twice is seen in the norm.
    expected = [pytest.approx(point, rel=1e-4) for point in single.curve]
    assert ddp[0].curve == expected
    twice = setup(tmp_path, "ddp", orthogonality=1.0)
    assert two_ranks.run(run, setup=twice, at=5)[0].curve != expected


def test_saved_adapter_holds_the_ranks_that_are_left_and_peft_loads_it(
    one_rank: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    seen = one_rank.run(f"{CASES}:train_and_save", setup=setup(tmp_path, "single"), folder=folder)[
        0
    ]
    kept = {name: sum(chosen) for name, chosen in seen["pattern"].items()}
    assert sum(kept.values()) == 2 * 28
    assert len(set(kept.values())) > 1
    weights = load_file(folder / "adapter_model.safetensors")
    for name, ranks in kept.items():
        key = f"base_model.model.{name}"
        assert weights[key].shape == (ranks, 1)
        assert weights[key.replace("lora_E", "lora_B")].shape[1] == ranks
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        logits = loaded(seen["ids"]).logits
    # Ranks that are left out added exact zeros, in sums of another length.
    assert torch.allclose(logits, seen["logits"], rtol=0, atol=2e-5 * float(logits.abs().max()))
    assert torch.equal(seen["again"], seen["logits"])


def test_a_run_that_is_stopped_and_resumed_exports_the_same(one_rank: Pool, tmp_path: Path) -> None:
    """From a checkpoint on disk, in the middle of taking ranks away."""
    train = "tests.integration.runs:train"

    def overrides(name: str) -> list[str]:
        return [
            f"run_dir={tmp_path / name}",
            "peft=adalora",
            "model=tiny",
            "data=instruct",
            "data.eval_path=none",
            "train.max_steps=8",
            "train.micro_batch_size=2",
            "train.global_batch_size=4",
            "data.max_length=64",
            "optim.lr=1e-2",
            *(f"peft.{key}={value}" for key, value in OPTIONS),
        ]

    assert one_rank.run(train, overrides=overrides("whole")) == ["done"]
    assert one_rank.run(train, overrides=overrides("cut"), stop_at=4) == ["preempted"]
    assert one_rank.run(train, overrides=[*overrides("cut"), "resume=auto"]) == ["done"]
    whole, cut = (exported(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    assert whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8, "final_rank": 8}, "peft.final_rank=8"),
        ({"initial_share": 0.5, "final_share": 0.5}, "peft.final_share=0.5"),
        ({"prune_every": 0}, "peft.prune_every=0"),
        ({"importance_decay": 0.0}, "peft.importance_decay=0.0"),
    ],
)
def test_settings_that_leave_no_budget_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdaloraConfig(**settings)
