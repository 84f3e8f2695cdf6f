"""A folder that was given as a model, and is something else, is named for what it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gspo_megatron.cli import convert, doctor, upcycle
from gspo_megatron.config import ModelConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.hf_config import read_shape
from gspo_megatron.recipe.model_folders import require_weights


def files(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "x" / name).touch()
        return folder / "x"

    return make


def inside(name: str, *names: str) -> Callable[[Path], Path]:
    return lambda folder: files(*names)(folder) / name


RUN = ("config.yaml", "checkpoints/step_000001/metadata.json", "checkpoints/step_000002/metadata.json")
HALF = "checkpoints/step_000003.unfinished/metadata.json"
CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {  # -> what it is, what to do
    "a run": (files(*RUN, HALF), "it has step_000001, step_000002", "for example {}/checkpoints/step_000002"),
    "a run with an export": (files(*RUN, "hf/config.json"), "it has step_000001, step_000002", "step_000002"),
    "its checkpoints": (inside("checkpoints", *RUN), "it has step_000001, step_000002", "{}/step_000002"),
    "many": (files(*(f"step_{i}/metadata.json" for i in range(1, 9))), "it has ..., step_4, step_5", "{}/step_8"),
    "a run without": (files("config.yaml", HALF), "a run's folder without a complete checkpoint", "write one first"),
    "a file": (inside("model.safetensors", "model.safetensors"), "is a file, not a folder", "in: {parent}"),
    "below a file": (inside("a/b", "a"), "no such folder", "Give a folder"),
    "an adapter": (files("adapter_config.json", "adapter_model.safetensors"), "is an adapter (PEFT)", "Merge it into"),
    "an adapter with a config": (files("adapter_config.json", "config.json"), "is an adapter (PEFT)", "Merge it into"),
    "pickles": (
        files("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "its weights are pytorch_model-00001-of-00002.bin, and only safetensors",
        "save_pretrained",
    ),
    "one pickle": (files("config.json", "pytorch_model.bin"), "its weights are pytorch_model.bin", "save_pretrained"),
    "GGUF": (files("model.Q4_K_M.gguf"), "its weights are model.Q4_K_M.gguf", "save_pretrained"),
    "the original": (files("consolidated.00.pth", "params.json"), "its weights are consolidated.00.pth", "Save"),
    "weights alone": (files("model.safetensors"), "has no config.json", "Give a Hugging Face folder"),
    "config alone": (files("config.json"), "has no model.safetensors.index.json or model.safetensors", "Give a"),
    "empty": (files("nothing"), "has no config.json and no model.safetensors", "Give a Hugging Face folder"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_named_for_what_it_is(tmp_path, name):
    """The same where weights are loaded, converted and upcycled."""
    make, what, remedy = CASES[name]
    folder = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        require_weights(folder, "here")
    told = str(caught.value).removeprefix("here = ")
    assert what in told and remedy.format(folder, parent=folder.parent) in told
    target = str(tmp_path / "target")
    for refused in (
        lambda: read_shape(ModelConfig(load_hf=folder)),
        lambda: convert.main([str(folder), target]),
        lambda: upcycle.main([str(folder), target]),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value).endswith(told)


def test_a_name_on_a_hub(tmp_path, monkeypatch):
    """Nothing is downloaded, and that is said; a path of two parts that is half there is a path."""
    monkeypatch.chdir(tmp_path)
    for refused in (
        lambda: read_shape(ModelConfig(load_hf=Path("org/Model-1.5B"))),
        lambda: read_shape(ModelConfig(hf_config=Path("org/Model-1.5B"))),
        lambda: convert.main(["org/Model-1.5B", "target"]),
        lambda: upcycle.main(["org/Model-1.5B", "target"]),
    ):
        with pytest.raises(ConfigError, match="nothing is downloaded"):
            refused()
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="SOURCE = 'runs/x': no such folder. Give a folder"):
        convert.main(["runs/x", "target"])


def test_a_checkpoint_where_a_model_is_wanted(tmp_path):
    folder = files("metadata.json", "hf/config.json")(tmp_path)
    with pytest.raises(ConfigError, match=f"is a Megatron checkpoint.*gspo-megatron convert {folder} FOLDER"):
        read_shape(ModelConfig(load_hf=folder))


def test_a_run_where_a_checkpoint_is_wanted(tmp_path):
    folder = files(*RUN)(tmp_path)
    with pytest.raises(ConfigError, match="--checkpoint = .* it has step_000001, step_000002. Give one of them"):
        doctor.parse(["--noise-floor", "--checkpoint", str(folder)], quiet=True)
