"""The embedded training templates render what the models were trained with, and mark the answers.

The expected texts are written out, from the models' own documentation of their formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoTokenizer

from dtune.assets import ASSETS
from dtune.errors import DataError
from dtune.objectives.schema.sft import SftConfig
from dtune.types import IGNORE_INDEX, Message, Row

TURNS = (
    Message("system", "Be brief."),
    Message("user", "2 + 2?"),
    Message("assistant", "4"),
    Message("user", "And 3 more?\nIn words."),
    Message("assistant", "seven"),
)


@dataclass(frozen=True)
class Template:
    """A template, the special tokens it speaks of, and what it makes of TURNS."""

    name: str
    tokens: dict[str, str]
    more_tokens: list[str]
    text: str
    answers: list[str]
    """Between the generation markers, the end token included."""
    prompt: str
    """That the last answer is generated from."""


LLAMA3_HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 more?\nIn words.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_HEAD = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n"
    "<|im_start|>user\nAnd 3 more?\nIn words.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
MISTRAL_HEAD = "<s>[INST] 2 + 2?[/INST] 4</s>[INST] Be brief.\n\nAnd 3 more?\nIn words.[/INST]"

TEMPLATES = [
    Template(
        "llama3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
        LLAMA3_HEAD + "seven<|eot_id|>",
        ["4<|eot_id|>", "seven<|eot_id|>"],
        LLAMA3_HEAD,
    ),
    Template(
        "chatml",
        {"eos_token": "<|im_end|>"},
        ["<|im_start|>"],
        CHATML_HEAD + "seven<|im_end|>\n",
        ["4<|im_end|>", "seven<|im_end|>"],
        CHATML_HEAD,
    ),
    Template(
        "mistral",
        {"bos_token": "<s>", "eos_token": "</s>"},
        ["[INST]", "[/INST]"],
        MISTRAL_HEAD + " seven</s>",
        [" 4</s>", " seven</s>"],
        MISTRAL_HEAD,
    ),
]


def tokenizer_for(template: Template) -> Any:
    """The embedded tokenizer, with the template and its special tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.add_special_tokens(
        {**template.tokens, "additional_special_tokens": template.more_tokens}
    )
    path = ASSETS / "templates" / f"{template.name}.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def conversation(turns: tuple[Message, ...] = TURNS) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in turns]


def test_every_embedded_template_is_tested() -> None:
    files = {path.stem for path in (ASSETS / "templates").glob("*.jinja")}
    assert files == {template.name for template in TEMPLATES}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_conversation_is_rendered_to_the_letter(template: Template) -> None:
    tokenizer = tokenizer_for(template)
    render = tokenizer.apply_chat_template
    assert render(conversation(), tokenize=False) == template.text
    prompt = render(conversation(TURNS[:-1]), tokenize=False, add_generation_prompt=True)
    assert prompt == template.prompt
    # What is generated from is what the answer was trained after.
    assert template.text.startswith(prompt)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_exactly_the_answers_and_their_end_tokens_are_trained(template: Template) -> None:
    tokenizer = tokenizer_for(template)
    objective = SftConfig().build(tokenizer)
    row = Row(index=0, origin="here:1", messages=TURNS)
    example = objective.render(row)
    assert tokenizer.decode(example.input_ids) == template.text
    spans: list[list[int]] = []
    for before, (token, label) in zip(
        [IGNORE_INDEX, *example.labels],
        zip(example.input_ids, example.labels, strict=True),
        strict=False,
    ):
        if label == IGNORE_INDEX:
            continue
        assert label == token
        if before == IGNORE_INDEX:
            spans.append([])
        spans[-1].append(token)
    assert [tokenizer.decode(span) for span in spans] == template.answers
    end = tokenizer.convert_tokens_to_ids(template.tokens["eos_token"])
    assert all(span[-1] == end for span in spans)
    # transformers' own mask agrees.
    encoded = tokenizer.apply_chat_template(
        conversation(), return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded["input_ids"] == example.input_ids
    mask = [label != IGNORE_INDEX for label in example.labels]
    assert [bool(marked) for marked in encoded["assistant_masks"]] == mask
    assert objective.prompt(row) == (
        tokenizer(template.prompt, add_special_tokens=False)["input_ids"],
        "seven",
    )


def test_a_role_that_mistral_does_not_know_is_refused() -> None:
    mistral = next(template for template in TEMPLATES if template.name == "mistral")
    objective = SftConfig().build(tokenizer_for(mistral))
    odd = Row(index=0, origin="here:7", messages=(Message("tool", "1"), *TURNS))
    with pytest.raises(DataError, match="here:7"):
        objective.render(odd)
