"""The embedded default: what is shipped is what the code generates, and fits its purpose."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dtune.assets import ASSETS
from dtune.assets.build import build_instructions, build_tokenizer
from dtune.assets.corpus import generate_corpus
from dtune.assets.instructions import Row, Split, generate_instructions
from dtune.assets.tokenizer import ROLES, SPECIAL_TOKENS

TINY = ASSETS / "tiny"
INSTRUCTIONS = ASSETS / "instructions"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def split() -> Split:
    return generate_instructions()


def _prompt(row: Row) -> tuple[str, str]:
    return row.instruction, row.input


def test_corpus_is_the_same_every_time_and_differs_by_seed() -> None:
    first = list(generate_corpus(seed=3, documents=200))
    assert first == list(generate_corpus(seed=3, documents=200))
    assert first != list(generate_corpus(seed=4, documents=200))


def test_a_longer_corpus_does_not_cost_more_at_once() -> None:
    assert next(generate_corpus(documents=10**6))


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_shipped_instructions_are_the_generated_ones(name: str, tmp_path: Path) -> None:
    build_instructions(tmp_path)
    assert (tmp_path / name).read_bytes() == (INSTRUCTIONS / name).read_bytes()


def test_shipped_tokenizer_is_the_trained_one(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_instructions_have_about_the_wanted_sizes(split: Split) -> None:
    assert 2800 <= len(split.train) <= 3200
    assert 250 <= len(split.heldout) <= 350
    assert {row.task for row in split.train} == {row.task for row in split.heldout}
    assert 8 <= len({row.task for row in split.train}) <= 14


def test_no_heldout_output_is_inside_a_training_output(split: Split) -> None:
    outputs = {row.output for row in split.train}
    leaks = [row for row in split.heldout if any(row.output in output for output in outputs)]
    assert leaks == []


def test_no_heldout_prompt_is_a_training_prompt(split: Split) -> None:
    assert not {_prompt(row) for row in split.train} & {_prompt(row) for row in split.heldout}
    assert len({_prompt(row) for row in split.train}) == len(split.train)
    assert len({_prompt(row) for row in split.heldout}) == len(split.heldout)


def test_corpus_has_neither_special_tokens_nor_instructions(split: Split) -> None:
    text = "\n".join(generate_corpus(documents=4_000))
    assert not [token for token in SPECIAL_TOKENS if token in text]
    instructions = {row.instruction for row in (*split.train, *split.heldout)}
    assert not [instruction for instruction in instructions if instruction in text]


def test_tokenizer_round_trips_corpus_and_instructions(
    tokenizer: PreTrainedTokenizerBase, split: Split
) -> None:
    texts = [*generate_corpus(documents=500), *(row.output for row in split.train), "Zürich 你好\t"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_starts_a_document_with_bos_only(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("Mira lives here.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_special_tokens_are_single_and_distinct(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [tokenizer(token, add_special_tokens=False).input_ids for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(SPECIAL_TOKENS)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert set(ROLES) <= set(tokenizer.all_special_tokens)


def test_template_marks_the_answers_and_their_end_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "Mira lives in Dorn."},
        {"role": "user", "content": "Reverse the word.\napple"},
        {"role": "assistant", "content": "e l p p a"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(marked) == "Mira lives in Dorn.<|end|>e l p p a<|end|>"


def test_generation_prompt_is_the_head_of_the_whole_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    user = [{"role": "user", "content": "Where does Mira live?"}]
    answer = [{"role": "assistant", "content": "Mira lives in Dorn."}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(user + answer, tokenize=False)
    assert prompt == "<|bos|><|user|>\nWhere does Mira live?<|end|><|assistant|>\n"
    assert whole == f"{prompt}Mira lives in Dorn.<|end|>"


def test_model_is_small_and_fits_its_config(tokenizer: PreTrainedTokenizerBase) -> None:
    path = TINY / "model.safetensors"
    config = json.loads((TINY / "config.json").read_text())
    assert path.stat().st_size < 4_000_000
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}
    parameters = sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())
    assert 900_000 <= parameters <= 1_100_000
    assert shapes["model.embed_tokens.weight"] == [len(tokenizer), config["hidden_size"]]
