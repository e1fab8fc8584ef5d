"""Models, adapters and run folders from strangers: nothing that they bring is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtune.cli import main
from dtune.config.freeze import load_frozen, read_frozen
from dtune.config.identity import model_identity
from dtune.errors import ConfigError
from dtune.models.load import load_tokenizer
from dtune.models.schema import ModelConfig
from dtune.models.weights import files_by_tensor
from dtune.resources import resolve_path
from tests.integration.train_runs import assembled, settings
from tests.unit.malicious import pickled, saved_by_torch

CODE = "import os\nos.system('touch {canary}')\n"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What a payload would make."""
    return tmp_path / "canary"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may spoil."""
    return Path(shutil.copytree(resolve_path("dtune://tiny"), tmp_path / "model"))


def change_json(file: Path, **more: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**content, **more}), encoding="utf-8")


def only_pickle(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(saved_by_torch(canary))


def pickle_by_another_name(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(pickled(canary))


def torch_file_by_another_name(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(saved_by_torch(canary))


def index_upwards(model: Path, canary: Path) -> None:
    shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    change_json(model / "model.safetensors.index.json", **index)


def index_of_an_absolute_path(model: Path, canary: Path) -> None:
    outside = shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": str(outside)}}
    change_json(model / "model.safetensors.index.json", **index)


def index_of_a_pickle(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "shard.bin").write_bytes(pickled(canary))
    index = {"weight_map": {"model.embed_tokens.weight": "shard.bin"}}
    change_json(model / "model.safetensors.index.json", **index)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (only_pickle, "convert the weights to safetensors"),
        (pickle_by_another_name, "is not a readable safetensors file"),
        (torch_file_by_another_name, "is not a readable safetensors file"),
        (index_upwards, "names a file outside its folder: ../outside.safetensors"),
        (index_of_an_absolute_path, "names a file outside its folder: /"),
    ],
)
def test_weights_that_are_no_safetensors_of_the_folder_are_refused(
    model: Path, canary: Path, spoil: Callable[[Path, Path], None], said: str
) -> None:
    spoil(model, canary)
    with pytest.raises(ConfigError, match=said):
        files_by_tensor(model)
    with pytest.raises(ConfigError, match=said):
        model_identity(ModelConfig(path=str(model)), seed=1)
    assert not canary.exists()


def own_class(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(CODE.format(canary=canary))
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_json(model / "config.json", model_type="evil", auto_map=classes)


def own_tokenizer(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(CODE.format(canary=canary))
    change_json(
        model / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )


def own_class_of_a_known_kind(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(CODE.format(canary=canary))
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def further_files(model: Path, canary: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "scheduler.pt"):
        (model / name).write_bytes(saved_by_torch(canary))
    for name in ("modeling_llama.py", "setup.py", "conftest.py"):
        (model / name).write_text(CODE.format(canary=canary))


@pytest.mark.parametrize(
    ("spoil", "refused"),
    [
        (own_class, True),
        (index_of_a_pickle, True),
        (own_tokenizer, True),
        (own_class_of_a_known_kind, False),
        (further_files, False),
    ],
)
def test_code_that_a_model_brings_is_not_run(
    model: Path, canary: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], refused: bool
) -> None:
    """Refused, or not looked at where what dtune itself has for the model will do."""
    spoil(model, canary)
    argv = settings(tmp_path / "run", f"model.path={model}", "train.max_steps=1")
    if refused:
        with pytest.raises(ConfigError, match=str(model)), assembled(argv):
            pass
    else:
        with assembled(argv) as it:
            assert it.trainer.total_steps == 1
    assert not canary.exists()


def test_a_chat_template_reaches_nothing_outside_of_itself(model: Path, canary: Path) -> None:
    template = (
        "{% for kind in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if kind.__name__ == 'Popen' %}{{ kind('touch CANARY', shell=True) }}{% endif %}"
        "{% endfor %}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    )
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not canary.exists()


def no_safetensors(adapter: Path, canary: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(saved_by_torch(canary))


def pickled_adapter(adapter: Path, canary: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(pickled(canary))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_safetensors, r"adapter_model\.safetensors missing"),
        (pickled_adapter, r"adapter_model\.safetensors is not a whole safetensors file"),
    ],
)
def test_an_adapter_that_is_a_pickle_is_refused(
    tmp_path: Path, canary: Path, spoil: Callable[[Path, Path], None], said: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    change_json(adapter / "adapter_config.json", peft_type="LORA", r=16)
    spoil(adapter, canary)
    argv = settings(tmp_path / "run", f"peft.init_from={adapter}", "train.max_steps=1")
    with pytest.raises(ConfigError, match=said), assembled(argv):
        pass
    assert not canary.exists()


CONFIGS = {
    "apply": "run_dir: !!python/object/apply:os.system ['touch CANARY']\n",
    "new": "run_dir: !!python/object/new:os.system ['touch CANARY']\n",
    "module": "run_dir: !!python/module:evil\n",
    "name": "model: {path: !!python/name:os.system}\n",
    "target": "_target_: os.system\n_args_: ['touch CANARY']\n",
    "target of a group": "optim: {_target_: os.system, _args_: ['touch CANARY']}\n",
    "target of the launcher": "launch: {name: local, _target_: os.system, command: touch CANARY}\n",
    "resolver": "model: {path: '${oc.create:{_target_: os.system}}'}\n",
    "code": 'model: {path: \'${eval:__import__("os").system("touch CANARY")}\'}\n',
    "launcher": "hydra: {launcher: {_target_: os.system}}\n",
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_of_a_run_folder_builds_nothing_but_settings(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "evil.py").write_text(CODE.format(canary=canary))
    monkeypatch.syspath_prepend(tmp_path)
    (run_dir / "config.yaml").write_text(CONFIGS[name].replace("CANARY", str(canary)))
    with pytest.raises(ConfigError):
        read_frozen(run_dir)
    for argv in (["eval", f"run_dir={run_dir}"], ["verify", str(run_dir)]):
        assert main(argv) in (1, 2)
    assert not canary.exists()


def test_a_target_is_refused_by_name_in_a_config_that_is_else_whole(
    tmp_path: Path, canary: Path
) -> None:
    with assembled(settings(tmp_path / "run")):
        text = (tmp_path / "run" / "config.yaml").read_text()
    load_frozen(text)
    for group in ("optim", "train", "launch"):
        crafted = text.replace(f"\n{group}:\n", f"\n{group}:\n  _target_: os.system\n")
        assert crafted != text
        with pytest.raises(ConfigError, match="_target_"):
            load_frozen(crafted)
    assert not canary.exists()
