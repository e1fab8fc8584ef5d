"""Objectives: which tokens are trained, what is asked, and the loss as a sum."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from dtune.assets import ASSETS
from dtune.errors import ConfigError, DataError
from dtune.objectives.schema.pretrain import PretrainConfig
from dtune.objectives.schema.sft import SftConfig
from dtune.objectives.sft import mark_tokens
from dtune.types import IGNORE_INDEX, Batch, Message, Objective, Row
from tests.unit.chat_template import PLAIN_TEMPLATE

CHAT = (
    Message("system", "Be short."),
    Message("user", "Where does Mira live?"),
    Message("assistant", " Mira lives in Dorn. "),
    Message("user", "And\nHugo?"),
    Message("assistant", "In Zürich 你好"),
)


def load_tokenizer(template: str = PLAIN_TEMPLATE) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def sft(tokenizer: Tokenizer) -> Objective:
    return SftConfig().build(tokenizer)


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large, so that what a token sees shows in its loss.
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_model()


def reference_loss(model: LlamaForCausalLM, batch: Batch, *, shift: int = 1) -> float:
    """Cross entropy over all positions at once, fp32, as textbooks write it."""
    # A cache would keep transformers from telling packed documents apart.
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logits = output.logits.float()[:, : batch.num_slots - shift]
    labels = batch.labels[:, shift:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()


def chat(*messages: Message) -> Row:
    return Row(0, "f.jsonl:1", messages=messages)


def trained_text(tokenizer: Tokenizer, objective: Objective, row: Row) -> str:
    labels = objective.render(row).labels
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


def test_labels_are_exactly_what_the_assistant_says(tokenizer: Tokenizer, sft: Objective) -> None:
    example = sft.render(chat(*CHAT))
    assert trained_text(tokenizer, sft, chat(*CHAT)) == (
        "Mira lives in Dorn.<|end|>In Zürich 你好<|end|>"
    )
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)
    text = tokenizer.decode(example.input_ids)
    assert text.count("<|bos|>") == 1
    assert text.endswith("<|user|>And\nHugo?<|end|><|assistant|>In Zürich 你好<|end|>")


def test_labels_are_those_of_apply_chat_template(tokenizer: Tokenizer, sft: Objective) -> None:
    messages = [{"role": m.role, "content": m.content} for m in CHAT]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    example = sft.render(chat(*CHAT))
    assert example.input_ids == encoded["input_ids"]
    mask = [int(label != IGNORE_INDEX) for label in example.labels]
    assert mask == encoded["assistant_masks"]


def test_all_tokens_of_a_last_character_are_trained() -> None:
    # Each of these characters is three or four tokens; none is lost at the end of the markers.
    template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{{ eos_token }}{% endfor %}"
    )
    tokenizer = load_tokenizer(template)
    objective = SftConfig().build(tokenizer)
    row = chat(Message("assistant", "so 好"), Message("assistant", "🙂"))
    assert trained_text(tokenizer, objective, row) == "so 好🙂"


@pytest.mark.parametrize(
    ("offsets", "spans", "marked"),
    [
        ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [False, True, False]),
        ([(0, 3), (3, 6)], [(2, 4)], [True, True]),
        ([(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 2), (4, 6)], [True, False, True, False]),
        ([(0, 2), (2, 4)], [], [False, False]),
        ([(0, 2), (2, 4)], [(2, 2)], [False, False]),
        # A tokenizer that trims blanks: the token of the blank at 2 has nothing left.
        ([(0, 2), (3, 3), (3, 4)], [(2, 4)], [False, True, True]),
        ([(0, 2), (3, 3), (3, 4)], [(3, 4)], [False, False, True]),
        ([(0, 0), (0, 2)], [(0, 2)], [False, True]),
    ],
)
def test_a_token_is_marked_by_the_text_it_stands_for(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], marked: list[bool]
) -> None:
    assert mark_tokens(offsets, spans) == marked


def test_the_prompt_ends_where_the_answer_begins(tokenizer: Tokenizer, sft: Objective) -> None:
    prompt = sft.prompt(chat(*CHAT))
    assert prompt is not None
    ids, expected = prompt
    assert expected == "In Zürich 你好"
    assert tokenizer.decode(ids).endswith("<|user|>And\nHugo?<|end|><|assistant|>")
    example = sft.render(chat(*CHAT))
    assert example.input_ids[: len(ids)] == ids
    assert example.labels[len(ids)] != IGNORE_INDEX
    assert sft.prompt(chat(CHAT[1])) is None


def test_without_a_template_sft_cannot_be_built() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"tokenizer has none.*set model\.chat_template=FILE"):
        SftConfig().build(tokenizer)


@pytest.mark.parametrize("start", ["generation", "- generation -", "-generation", "+ generation"])
def test_only_a_template_with_generation_markers_is_taken(start: str) -> None:
    body = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"no \{% generation %\} markers.*model\.chat_template"):
        SftConfig().build(load_tokenizer(body + " generation {# % generation % #}"))
    SftConfig().build(load_tokenizer(f"{{%{start}%}}{body}{{%- endgeneration %}}"))


def test_a_template_that_is_no_jinja_is_an_error_of_the_config() -> None:
    objective = SftConfig().build(load_tokenizer("{% generation %}{{ messages }"))
    with pytest.raises(ConfigError, match=r"model\.chat_template is not valid Jinja") as error:
        objective.render(chat(*CHAT))
    assert not isinstance(error.value, DataError)


def test_a_slow_tokenizer_cannot_say_which_text_is_which_token() -> None:
    with pytest.raises(ConfigError, match=r"needs a fast tokenizer.*model\.tokenizer"):
        SftConfig().build(ByT5Tokenizer())


def test_a_row_that_the_template_refuses_is_named(sft: Objective) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template refuses this row.*wizard"):
        sft.render(chat(Message("wizard", "Q"), CHAT[2]))


def test_pretraining_ends_each_document_once_and_trains_on_all(tokenizer: Tokenizer) -> None:
    objective = PretrainConfig().build(tokenizer)
    example = objective.render(Row(0, "f:1", text="Mira lives here."))
    assert tokenizer.decode(example.input_ids) == "<|bos|>Mira lives here.<|end|>"
    assert example.labels == example.input_ids
    assert example.num_targets == len(example.input_ids) - 1
    again = objective.render(Row(0, "f:1", text="Mira lives here.<|end|>"))
    assert again == example
    assert objective.prompt(Row(0, "f:1", text="Mira lives here.")) is None


def test_pretraining_needs_an_end_token() -> None:
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"tokenizer has none; set model\.tokenizer"):
        PretrainConfig().build(tokenizer)


def make_batch(*sequences: list[int], ignored: int = 2, width: int = 24) -> Batch:
    """One row of documents; each trains on all but its first ``ignored`` tokens."""
    ids, labels, positions, numbers = [], [], [], []
    for number, tokens in enumerate(sequences):
        ids += tokens
        labels += [IGNORE_INDEX] * ignored + tokens[ignored:]
        positions += list(range(len(tokens)))
        numbers += [number] * len(tokens)
    rest = width - len(ids)
    columns = {
        "input_ids": ids + [0] * rest,
        "labels": labels + [IGNORE_INDEX] * rest,
        "position_ids": positions + list(range(rest)),
        "document_ids": numbers + [-1] * rest,
    }
    return Batch(
        **{name: torch.tensor([values]) for name, values in columns.items()},
        attention_mask=None,
        rows=(tuple(range(len(sequences))),),
        num_tokens=len(ids),
        num_targets=sum(label != IGNORE_INDEX for label in labels),
    )


DOCUMENTS = ([3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9])


def test_loss_is_the_sum_over_shifted_targets(model: LlamaForCausalLM, sft: Objective) -> None:
    batch = make_batch(*DOCUMENTS)
    total = sft.loss(model, batch).total
    # The same terms in the same order: what differs is fp32 rounding of one sum.
    assert total.item() == pytest.approx(reference_loss(model, batch), rel=1e-6)
    assert total.item() != pytest.approx(reference_loss(model, batch, shift=0), rel=1e-2)
    assert total.dtype == torch.float32


def test_packed_documents_have_the_losses_they_have_alone(
    model: LlamaForCausalLM, sft: Objective
) -> None:
    together = sft.loss(model, make_batch(*DOCUMENTS)).total.item()
    alone = sum(sft.loss(model, make_batch(tokens, width=9)).total.item() for tokens in DOCUMENTS)
    assert together == pytest.approx(alone, rel=1e-5)
    joined = [token for tokens in DOCUMENTS for token in tokens]
    leaking = replace(make_batch(*DOCUMENTS), position_ids=make_batch(joined).position_ids)
    assert sft.loss(model, leaking).total.item() != pytest.approx(alone, rel=1e-2)


def test_without_targets_the_loss_is_zero_and_reaches_every_parameter(
    model: LlamaForCausalLM, sft: Objective
) -> None:
    model.zero_grad(set_to_none=True)
    total = sft.loss(model, make_batch([1], ignored=1)).total
    assert total.item() == 0
    (total / 7).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_a_row_of_padding_alone_gives_no_nan(model: LlamaForCausalLM, sft: Objective) -> None:
    model.zero_grad(set_to_none=True)
    mask = torch.zeros(1, 24, dtype=torch.long)
    mask[0, 0] = 1
    padded = replace(make_batch(width=24), attention_mask=mask)
    total = sft.loss(model, padded).total
    total.backward()
    assert total.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_loss_of_a_bf16_model_is_summed_in_fp32(sft: Objective) -> None:
    half = build_model().to(torch.bfloat16)
    batch = make_batch(*DOCUMENTS)
    total = sft.loss(half, batch).total
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(reference_loss(half, batch), rel=1e-6)
    # A sum in bf16 has 8 bits and would be off by more.
    assert total.item() != total.to(torch.bfloat16).item()
