"""Layouts by world size, and everything that is refused before a process group exists."""

import dataclasses
import importlib.machinery
import importlib.util
import json

import pytest

from gspo_megatron.config import ParallelConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe import check, lint
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import REPOSITORY, load_recipe
from tests.processes import imported_by

TINY = json.loads((REPOSITORY / "examples/models/qwen3_moe_tiny/config.json").read_text())


def configured(*argv: str) -> TrainConfig:
    return load_recipe(list(argv))


def sizes(layout: ParallelConfig) -> tuple:
    return (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        layout.context_parallel_size,
    )


def refusal(world_size: int, *argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        config = configured(*argv)
        check.check(config, resolve_layout(config, world_size, has_cuda=False), world_size)
    return str(error.value)


def model_file(folder, **changes) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in (TINY | changes).items() if value is not ...}))
    return str(path)


@pytest.mark.parametrize("has_cuda", [False, True])
@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(1, (1, 1, 1)), (2, (1, 2, 1)), (3, (1, 1, 1)), (4, (2, 2, 2)), (8, (2, 2, 2)), (16, (1, 1, 1))],
)
def test_defaults_by_world_size(world_size, expected, has_cuda):
    assert sizes(resolve_layout(TrainConfig(), world_size, has_cuda)) == (*expected, None, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tensor_model_parallel_size": 2}, (2, 1, 1, None, 1)),
        ({"expert_model_parallel_size": 4}, (1, 1, 4, None, 1)),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, (1, 2, 1, 2, 1)),
        ({"virtual_pipeline_model_parallel_size": 1}, (2, 2, 2, None, 1)),
        ({"expert_tensor_parallel_size": 2}, (1, 1, 1, None, 1)),
        ({"context_parallel_size": 2}, (1, 1, 1, None, 2)),
    ],
)
def test_one_given_size_sets_the_others_to_1(given, expected):
    config = dataclasses.replace(TrainConfig(), parallel=ParallelConfig(**given))
    assert sizes(resolve_layout(config, 4, has_cuda=False)) == expected


def test_other_fields_of_the_layout_are_kept():
    config = dataclasses.replace(TrainConfig(), parallel=ParallelConfig(use_distributed_optimizer=True))
    assert resolve_layout(config, 2, has_cuda=False).use_distributed_optimizer


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_example_recipe_passes_at_its_world_sizes(world_size):
    config = configured(str(REPOSITORY / "examples/recipes/moe_gspo.yaml"))
    check.check(config, resolve_layout(config, world_size, has_cuda=False), world_size)


@pytest.mark.parametrize(
    ("world_size", "argv", "parts"),
    [
        (
            4,
            ["--parallel.tensor-model-parallel-size", "2", "--parallel.pipeline-model-parallel-size", "3"],
            ["tensor 2 x pipeline 3 = 6 does not divide 4 ranks", "multiple of 6"],
        ),
        (
            4,
            ["--parallel.expert-model-parallel-size", "4", "--parallel.pipeline-model-parallel-size", "2"],
            ["expert 4 x expert tensor 1 x pipeline 2 = 8 does not divide 4 ranks"],
        ),
        (2, ["--parallel.expert-tensor-parallel-size", "4"], ["expert 1 x expert tensor 4 x pipeline 1 = 4"]),
        (3, ["--parallel.pipeline-model-parallel-size", "3"], ["num_hidden_layers 4", "3 pipeline stages", "1, 2, 4"]),
        (
            2,
            ["--parallel.pipeline-model-parallel-size", "2", "--parallel.virtual-pipeline-model-parallel-size", "3"],
            ["num_hidden_layers 4", "2 pipeline stages x 3 virtual stages"],
        ),
        (
            2,
            ["--parallel.virtual-pipeline-model-parallel-size", "2"],
            ["parallel.virtual_pipeline_model_parallel_size = 2", "pipeline of 2 or more"],
        ),
        (
            2,
            ["--parallel.pipeline-model-parallel-size", "2", "--parallel.num-layers-in-first-pipeline-stage", "4"],
            ["parallel.num_layers_in_first_pipeline_stage = 4: of the model's 4 layers 0 are left for 1 other stages"],
        ),
        (
            4,
            ["--parallel.pipeline-model-parallel-size", "4", "--parallel.num-layers-in-last-pipeline-stage", "2"],
            ["parallel.num_layers_in_last_pipeline_stage = 2: of the model's 4 layers 2 are left for 3 other stages"],
        ),
        (
            2,
            ["--parallel.expert-model-parallel-size", "2", "--parallel.num-layers-in-last-pipeline-stage", "2"],
            ["is for a pipeline of 2 or more stages without virtual ones, and there are 1 x 1"],
        ),
        (
            2,
            [
                "--parallel.pipeline-model-parallel-size",
                "2",
                "--parallel.num-layers-in-last-pipeline-stage",
                "2",
                "--parallel.virtual-pipeline-model-parallel-size",
                "2",
            ],
            ["and there are 2 x 2"],
        ),
        (3, ["--parallel.expert-model-parallel-size", "3", "--rollout.num-prompts", "3"], ["num_experts 8", "size 3"]),
        (8, ["--parallel.tensor-model-parallel-size", "8"], ["num_attention_heads 4", "tensor parallel size 8"]),
        (4, ["--parallel.tensor-model-parallel-size", "4"], ["num_key_value_heads 2", "tensor parallel size 4"]),
        (5, ["--parallel.expert-tensor-parallel-size", "5"], ["moe_intermediate_size 96", "expert tensor parallel"]),
        (3, [], ["rollout.num_prompts = 32", "3 data-parallel ranks", "multiple of 3"]),
        (16, ["--rollout.group-size", "3"], ["algorithm.num_minibatches = 4", "are 6 on each of 16"]),
        (1, ["--algorithm.num-minibatches", "7"], ["algorithm.num_minibatches = 7", "32 prompts x 8 responses"]),
        (16, ["--warm-start.batch-size", "100"], ["warm_start.batch_size = 100", "16 data-parallel ranks"]),
        (
            1,
            ["--rollout.max-response-length", "200"],
            ["data.max_prompt_length 96 + rollout.max_response_length 200 = 296", "max_position_embeddings 256"],
        ),
        (
            4,
            ["--parallel.context-parallel-size", "3"],
            ["parallel.context_parallel_size = 3", "tensor 1 x context 3 x pipeline 1 = 3 does not divide 4 ranks"],
        ),
        (4, ["--parallel.context-parallel-size", "0"], ["parallel.context_parallel_size = 0", "at least 1"]),
        (
            4,
            ["--parallel.context-parallel-size", "2", "--parallel.expert-model-parallel-size", "8"],
            ["expert 8 x expert tensor 1 x pipeline 1 = 8 does not divide 4 ranks"],
        ),
        (
            4,
            ["--parallel.context-parallel-size", "2", "--rollout.num-prompts", "6"],
            [
                "rollout.num_prompts = 6",
                "2 data-parallel ranks (ranks / tensor / context / pipeline) x context 2",
                "multiple of 4",
            ],
        ),
        (
            4,
            [
                "--parallel.context-parallel-size",
                "4",
                "--rollout.max-response-length",
                "29",
                "--max-tokens-per-microbatch",
                "127",
            ],
            ["= 125, 128 with padding to a multiple of 8 (twice parallel.context_parallel_size)", "Give 128 or more"],
        ),
        (
            4,
            ["--parallel.context-parallel-size", "4", "--rollout.max-response-length", "161"],
            ["= 257, 264 with padding", "exceeds the model's max_position_embeddings 256"],
        ),
        (1, ["--max-tokens-per-microbatch", "100"], ["max_tokens_per_microbatch = 100", "96 + ", "= 128", "Give 128"]),
    ],
)
def test_what_cannot_work_is_refused(world_size, argv, parts):
    message = refusal(world_size, *argv)
    for part in parts:
        assert part in message


def test_context_parallel_ranks_train_on_the_same_sequences():
    """4 prompts suffice for 4 replicas in generation, and a warm-start batch of 2 for the 2 of training."""
    config = configured(
        "--parallel.context-parallel-size",
        "2",
        "--rollout.num-prompts",
        "4",
        "--warm-start.batch-size",
        "2",
        "--parallel.expert-model-parallel-size",
        "4",
    )
    check.check(config, resolve_layout(config, 4, has_cuda=False), 4)


def test_a_warm_start_that_is_off_is_not_checked():
    config = configured("--warm-start.batch-size", "100", "--warm-start.steps", "0")
    check.check(config, resolve_layout(config, 16, has_cuda=False), 16)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2' is not supported", "qwen3_moe"]),
        ({"num_experts": ...}, ["num_experts is missing. Add the model's own num_experts"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers is '4'"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9 exceeds the number of experts 8"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4 is no multiple of num_key_value_heads 3"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type 'yarn'"]),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, ["rope_type 'linear'"]),
        ({"use_sliding_window": True, "sliding_window": 8}, ["sliding-window"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
    ],
)
def test_a_model_that_would_be_trained_as_something_else_is_refused(tmp_path, changes, parts):
    message = refusal(1, "--model.hf-config", model_file(tmp_path, **changes))
    for part in ["model.hf_config = ", *parts]:
        assert part in message


def test_dense_layers_must_fit_tensor_parallelism(tmp_path):
    path = model_file(tmp_path, mlp_only_layers=[0], intermediate_size=257)
    assert "intermediate_size 257" in refusal(
        2, "--model.hf-config", path, "--parallel.tensor-model-parallel-size", "2"
    )


@pytest.mark.parametrize(("content", "part"), [("{", "no JSON object"), ("[1]", "must be a JSON object")])
def test_a_model_file_that_is_no_config(tmp_path, content, part):
    (tmp_path / "config.json").write_text(content)
    assert part in refusal(1, "--model.hf-config", str(tmp_path / "config.json"))


def test_a_folder_to_start_from_lacks_something(tmp_path):
    """Each file is asked for in turn; then the model is the folder's, whatever hf_config says."""
    given = ["--model.load-hf", str(tmp_path)]
    assert "model.load_hf = " in refusal(1, "--model.load-hf", "nowhere") and "no such folder" in refusal(
        1, "--model.load-hf", "nowhere"
    )
    assert "has no config.json and no model.safetensors.index.json or model.safetensors" in refusal(1, *given)
    (tmp_path / "model.safetensors").touch()
    assert "has no config.json. " in refusal(1, *given)
    model_file(tmp_path, vocab_size=255)
    assert "has no tokenizer (tokenizer.json" in refusal(1, *given)
    (tmp_path / "tokenizer.json").touch()
    assert "vocab_size 255 cannot be divided evenly over tensor parallel size 2" in refusal(
        2, *given, "--parallel.tensor-model-parallel-size", "2"
    )


def test_experts_of_a_dense_model_cannot_be_cut(tmp_path):
    path = model_file(tmp_path, model_type="qwen3")
    assert "parallel.expert_model_parallel_size = 2: the model is dense (qwen3)" in refusal(
        2, "--model.hf-config", path, "--parallel.expert-model-parallel-size", "2"
    )


def test_experts_with_biases_cannot_be_cut(tmp_path):
    path = model_file(tmp_path, model_type="gpt_oss", attention_bias=True, sliding_window=32)
    assert "parallel.expert_tensor_parallel_size = 2: experts of gpt_oss have biases" in refusal(
        2,
        "--model.hf-config",
        path,
        "--parallel.expert-tensor-parallel-size",
        "2",
        "--parallel.tensor-model-parallel-size",
        "2",
    )


def test_linear_attention_is_not_cut_over_tokens_nor_within_a_head(tmp_path):
    path = model_file(
        tmp_path,
        model_type="qwen3_next",
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        shared_expert_intermediate_size=16,
    )
    given = ("--model.hf-config", path)
    assert "parallel.context_parallel_size = 2: qwen3_next has linear attention" in refusal(
        2, *given, "--parallel.context-parallel-size", "2"
    )
    assert "the model's linear_num_key_heads 1 cannot be divided evenly over tensor parallel size 2" in refusal(
        2, *given, "--parallel.tensor-model-parallel-size", "2"
    )


LATENT = dict(
    model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, n_group=1,
    topk_group=1, routed_scaling_factor=1.0, topk_method="noaux_tc", scoring_func="sigmoid",
)  # fmt: skip


def test_latent_attention_is_refused_where_transformer_engine_would_run_it(tmp_path, monkeypatch):
    """By the flag, and the flag is up where a GPU, bf16 and the package meet; with our own layers it is trained."""
    given = ["--model.hf-config", model_file(tmp_path, **LATENT), "--model.params-dtype", "bf16"]
    config = configured(*given)
    layout = resolve_layout(config, 1, has_cuda=False)
    check.check(config, layout, 1, transformer_engine=False)
    with pytest.raises(ConfigError, match="params_dtype = 'bf16': deepseek_v3 has latent attention.*Give fp32"):
        check.check(config, layout, 1, transformer_engine=True)
    check.check(configured("--model.params-dtype", "bf16"), layout, 1, transformer_engine=True)  # has no such attention
    found = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.append(name) or "there")
    assert check.uses_transformer_engine(config, has_gpu=True) and found == ["transformer_engine"]
    for other, has_gpu in ((configured(*given), False), (configured(*given, "--device", "cpu"), True),
                           (configured(*given[:2]), True)):  # fmt: skip
        assert not check.uses_transformer_engine(other, has_gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not check.uses_transformer_engine(config, has_gpu=True)


def test_the_commands_ask_whether_transformer_engine_would_run(tmp_path, monkeypatch):
    """Of a machine with a GPU that has the package; nothing is started."""
    from gspo_megatron.cli import doctor, slurm, train

    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    for module in (train, doctor):
        monkeypatch.setattr(module, "layout_of", lambda config: (resolve_layout(config, 1, has_cuda=True), 1))
        monkeypatch.setattr(module, "gpu_count", lambda: 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{hf_config: {model_file(tmp_path, **LATENT)}, params_dtype: bf16}}\n")
    commands = [(train, [str(recipe)]), (doctor, ["--noise-floor", str(recipe)])]
    for command, argv in [*commands, (slurm, [str(recipe), "--nodes", "1"])]:
        with pytest.raises(ConfigError, match="has latent attention"):
            command.main(argv)


@pytest.mark.parametrize(
    ("changes", "tensor", "told"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, "num_key_value_heads 2"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 8, "num_key_value_heads 2"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "num_key_value_heads 6"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, 2, "num_attention_heads 5"),
    ],
)
def test_more_tensor_ranks_than_key_value_heads_are_refused_with_sizes_that_fit(tmp_path, changes, tensor, told):
    """The sizes are those that divide all of the model's sizes, so each of them passes when it is tried."""
    path = model_file(tmp_path, **changes)
    given = ["--model.hf-config", path, "--parallel.tensor-model-parallel-size"]
    message = refusal(tensor, *given, str(tensor))
    assert f"parallel.tensor_model_parallel_size = {tensor}: the model's {told} cannot be divided evenly" in message
    fitting = message.partition("Sizes that fit the model: ")[2].rstrip(".").split(", ")
    heads = changes.values()
    assert fitting == [str(n) for n in range(1, 65) if all(size % n == 0 for size in heads)]


def test_a_missing_model_file():
    assert "model.hf_config = 'nowhere.json': no such file" in refusal(1, "--model.hf-config", "nowhere.json")


@pytest.mark.parametrize(
    ("tasks", "part"),
    [
        ("{spell_backwards: {}}", "tasks = 'spell_backwards'"),
        ("{spell_backward: {options: {min_word_length: 3}}}", "tasks.spell_backward.options.min_word_length"),
    ],
)
def test_tasks_are_checked(tmp_path, tasks, part):
    (tmp_path / "recipe.yaml").write_text(f"tasks: {tasks}\n")
    assert part in refusal(1, str(tmp_path / "recipe.yaml"))


def test_a_penalty_in_the_reward_needs_old_log_probs_of_all_minibatches():
    """PPO's penalty is in the reward unless the recipe says otherwise."""
    argv = ["--algorithm.name", "ppo", "--algorithm.old-logprobs", "first_minibatch"]
    assert "KL penalty in the reward" in refusal(1, *argv)
    for other in (["--algorithm.kl.place", "loss"], ["--algorithm.kl.coef", "0"]):
        config = configured(*argv, *other)
        check.check(config, resolve_layout(config, 1, has_cuda=False), 1)


def test_ppo_needs_no_groups():
    config = configured("--algorithm.name", "ppo", "--rollout.group-size", "1")
    check.check(config, resolve_layout(config, 2, has_cuda=False), 2)


def test_cuda_without_a_gpu():
    with pytest.raises(ConfigError, match="device = 'cuda': no GPU"):
        resolve_layout(configured("--device", "cuda"), 1, has_cuda=False)
    assert resolve_layout(configured("--device", "cuda"), 1, has_cuda=True)


def test_warnings():
    assert lint.warnings(TrainConfig()) == []
    found = lint.warnings(configured("--algorithm.clip-ratio-high", "0.27", "--model.moe-aux-loss-coeff", "0.01"))
    assert len(found) == 2
    assert "algorithm.clip_ratio_high = 0.27" in found[0] and "4e-4" in found[0]
    assert "model.moe_aux_loss_coeff = 0.01" in found[1]


def test_a_warm_start_of_trained_weights_is_warned_about():
    assert "warm_start.steps = 200" in lint.warnings(configured("--model.load-hf", "folder"))[0]
    assert lint.warnings(configured("--model.load-hf", "folder", "--warm-start.steps", "0")) == []


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--algorithm.name", "grpo", "--algorithm.clip-ratio-low", "3e-4"], "clip range for the sequence ratios"),
        (["--algorithm.aggregation", "token_mean"], "every sequence counts the same"),
        (["--algorithm.old-logprobs", "rollout"], "log-probs of two engines of different packing"),
        (["--algorithm.old-logprobs", "rollout", "--model.params-dtype", "bf16"], "error of about 1.5e-4"),
        (["--rollout.top-p", "0.9"], "the ratio does not see the cut"),
    ],
)
def test_a_ratio_other_than_the_papers_is_warned_about(argv, text):
    assert text in " ".join(lint.warnings(configured(*argv)))


def test_refusing_imports_neither_torch_nor_megatron():
    code = (
        "from gspo_megatron import errors; from gspo_megatron.recipe import check\n"
        "from gspo_megatron.cli import convert, doctor, main, slurm, study, train, upcycle\n"
        "from gspo_megatron.recipe.layout import resolve_layout\n"
        "from gspo_megatron.recipe.load import load_recipe\n"
        "c = load_recipe(['--data.max_prompt_length', '400'])\n"
        "try: check.check(c, resolve_layout(c, 1, False), 1)\n"
        "except errors.ConfigError: pass\n"
        "else: raise SystemExit('not refused')"
    )
    assert imported_by(code, "torch", "megatron", "transformers") == set()


@pytest.mark.parametrize(
    ("generation", "argv", "words"),
    [
        ({"eos_token_id": "</s>"}, (), "generation_config.json': eos_token_id is '</s>', not a token id or a list"),
        ({"eos_token_id": [2, 5]}, ("--rollout.stop-token-ids", "5", "512"), "stop_token_ids = 512: is not below"),
    ],
)
def test_stop_tokens_are_refused_before_the_ranks_start(tmp_path, generation, argv, words):
    model_file(tmp_path, vocab_size=512)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert words in refusal(1, "--model.load-hf", str(tmp_path), *argv)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(name, tmp_path, monkeypatch):
    """Before a rank starts. A folder of that name in the working directory (W&B makes ./wandb) is no package."""
    given = f"--tracking.{name}"
    config = configured(given)
    check.check(config, resolve_layout(config, 1, has_cuda=False), 1)
    real = importlib.util.find_spec
    folder = importlib.machinery.ModuleSpec(name, None, is_package=True)
    for found in (None, folder):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda asked, found=found: found if asked == name else real(asked)
        )
        assert refusal(1, given) == (
            f"tracking.{name} = True: the package {name} is not installed. Run: pip install 'gspo-megatron[{name}]'"
        )


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--tracking.project", ""], "tracking.project = '': must be 1 to 128 characters"),
        (["--tracking.project", "team/ours"], "tracking.project = 'team/ours': must be 1 to 128 characters, none of /"),
        (["--tracking.mlflow-uri", "http://a\n"], "tracking.mlflow_uri = 'http://a\\n': must be a URI"),
        (["--tracking.log-samples", "-1"], "tracking.log_samples = -1: must be 0 or more. Give 0 for none."),
    ],
)
def test_values_of_tracking_that_mean_nothing_are_refused(argv, part):
    assert part in refusal(1, *argv)
