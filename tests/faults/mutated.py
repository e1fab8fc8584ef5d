"""Wrong settings and wrong frozen files, made from right ones by a seed."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One thing that is wrong, and a word that the answer must have: its key, as a rule."""

    what: str
    settings: tuple[str, ...]
    named: str


NUMBERS = ("optim.lr", "optim.weight_decay", "train.max_norm", "train.epochs", "peft.alpha")
COUNTS = ("peft.rank", "train.micro_batch_size", "checkpoint.every", "data.max_length", "seed")
TRUTHS = ("data.packing", "train.compile", "checkpoint.asynchronous", "data.shuffle")
CHOICES = ("peft", "quant", "parallel", "data", "model", "schedule", "precision")
PATHS = ("data.path", "data.eval_path", "model.path", "model.chat_template", "resume")
FIXED = (
    ("world not divisible", ("train.micro_batch_size=3",), "train.micro_batch_size"),
    ("ranks not divisible", ("parallel=ddp", "launch.nproc=3"), "train.global_batch_size"),
    ("illegal combination", ("peft=full", "quant=nf4"), "peft=full"),
    ("illegal engine", ("parallel=single", "launch.nproc=2"), "parallel=single"),
    ("objective without its data", ("objective=pretrain",), "data.format"),
    ("needs what is off", ("train.early_stopping=3", "train.eval_every=0"), "train.eval_every"),
    ("group given a number", ("optim=5",), "optim=5"),
    ("group given nothing", ("data=null",), "data=null"),
    ("no key", ("=5",), "=5"),
    ("no value", ("peft.rank",), "peft.rank"),
    ("unknown reference", ("train.max_steps=${foo}",), "foo"),
    ("reference to itself", ("seed=${seed}",), "seed"),
    ("unset variable", ("seed=${oc.env:NO_SUCH_VARIABLE}",), "NO_SUCH_VARIABLE"),
    ("object in a list of texts", ("model.added_tokens=[1,{}]",), "model.added_tokens"),
    ("a tag", ("peft.dropout=!!python/object:os.system",), "peft.dropout"),
    ("cut quote", ('data.path="a',), "data.path"),
    ("cut list", ("peft.targets=[q_proj",), "peft.targets"),
    ("two dots", ("peft..rank=8",), "peft..rank"),
    ("a flag", ("--lr",), "--lr"),
    ("column that the format lacks", ("data.columns={foo: bar}",), "data.columns"),
    ("sweep without -m", ("optim.lr=1e-4,1e-3",), "optim.lr"),
    ("deleted key", ("~optim.lr",), "optim.lr"),
    ("full-width digit", ("optim.lr=\uff11",), "optim.lr"),
)


def misspell(key: str, chance: random.Random) -> str:
    """The key with two letters of its last part exchanged, or one left out."""
    at = chance.randrange(key.rfind(".") + 1, len(key) - 1)
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    return swapped if swapped != key else key[:at] + key[at + 1 :]


def mutate_settings(seed: int) -> list[Mutation]:
    """Wrong command lines: every kind of mistake, on keys that the seed chooses."""
    chance = random.Random(seed)
    made = [Mutation(what, settings, named) for what, settings, named in FIXED]

    def add(what: str, key: str, value: str) -> None:
        made.append(Mutation(what, (f"{key}={value}",), key))

    for value in ("nan", "inf", "1e400", "-1", "fast", "null", "[1,2]", "{a: 1}"):
        add(f"number {value}", chance.choice(NUMBERS), value)
    for value in ("1.5", "-3", "1e400", "99999999999999999999", "''", "[8]", "true"):
        add(f"count {value}", chance.choice(COUNTS), value)
    for value in ("maybe", "2", "1.0"):
        add(f"truth {value}", chance.choice(TRUTHS), value)
    add("minus nought", "optim.lr", "-0")
    for path in PATHS:
        add("missing file", path, f"/no/such/{chance.randrange(1000)}.jsonl")
    add("empty path", chance.choice(PATHS), "''")
    for group in chance.sample(CHOICES, 4):
        add("misspelt option", group, "lroa" if group == "peft" else f"{group}x")
    for key in chance.sample([*NUMBERS, *COUNTS, *TRUTHS], 5):
        wrong = misspell(key, chance)
        made.append(Mutation("misspelt key", (f"{wrong}=1",), wrong))
    return made


def mutate_text(text: str, seed: int) -> dict[str, bytes]:
    """Wrong versions of a right config.yaml, by what is wrong."""
    chance = random.Random(seed)
    lr = re.search(r"^  lr: .*$", text, re.MULTILINE)
    assert lr is not None

    def lr_as(value: str) -> str:
        return text.replace(lr[0], f"  lr: {value}", 1)

    lines = text.splitlines(keepends=True)
    top = [number for number, line in enumerate(lines) if re.match(r"seed:", line)]
    values: dict[str, str | bytes] = {
        "key twice": text + "seed: 2\n",
        "nested key twice": text.replace(lr[0], f"{lr[0]}\n{lr[0]}", 1),
        "unknown key": text + f"{misspell('resume', chance)}: 2\n",
        "unknown nested key": text.replace(lr[0], f"{lr[0]}\n  {misspell('lrate', chance)}: 3", 1),
        "not UTF-8": text.encode() + b"# \xff\xfe\n",
        "NUL": text + "seed: \0\n",
        "python tag": lr_as("!!python/object/apply:os.system ['touch CANARY']"),
        "path tag": text.replace(
            "run_dir: ", "run_dir: !!python/object/apply:pathlib.PosixPath\n- /x\n# ", 1
        ),
        "own tag": lr_as("!foo 1"),
        "1e400": lr_as("1.0e+400"),
        "nan": lr_as(".nan"),
        "minus nought": lr_as("-0.0"),
        "list": lr_as("[1, 2]"),
        "mapping": lr_as("{a: 1}"),
        "empty": lr_as(""),
        "tab": text.replace(lr[0], "\tlr: 1", 1),
        "cut": "".join(lines[: chance.randrange(10, len(lines) - 10)])[:-4] + "\n? [",
        "empty file": "",
        "a list": "- a\n- b\n",
        "a number": "42\n",
        "bytes": bytes(range(256)),
        "deep": "a: " + "[" * 3000 + "]" * 3000 + "\n",
        "aliases": text + "x: &x [1]\ny: *x\n",
        "alias of itself": "a: &a [*a]\n",
        "open reference": text.replace(lines[top[0]], "seed: ${\n", 1),
        "unknown resolver": text.replace(lines[top[0]], "seed: ${os.system:ls}\n", 1),
        "truth of two": text.replace("  asynchronous: true", "  asynchronous: 2", 1),
        "two documents": text + "---\nseed: 3\n",
        "no value": text.replace(lines[top[0]], "seed: ???\n", 1),
        "null key": text + "null: 2\n",
        "option of no name": re.sub(r"(?m)^  name: lora$", "  name: lroa", text),
        "group as a word": re.sub(r"(?m)^peft:\n(?:[ -].*\n)+", "peft: lora\n", text),
    }
    return {
        what: value if isinstance(value, bytes) else value.encode()
        for what, value in values.items()
    }
