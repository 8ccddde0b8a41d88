"""Every recipe in train_configs/ at full size: valid, as large as its source reports, with room on its GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.workloads.recipes import RECIPES, build
from titanmoe.config import ConfigError, load_config, resolve, validate
from titanmoe.metrics.flops import num_parameters
from titanmoe.metrics.units import format_count
from titanmoe.models.family import get_family

CHECKOUT = Path(__file__).parents[2]
BASES = {"malaysian_sft"}
"""Files that only others build on."""

# Adapters in numbers, worked out by hand: rank x (inputs + outputs) of every linear layer; experts have one A for gate
# and up. Each line: layers x rank x (q, k, v, o and feed-forward), then layers x experts x rank x (gate and up, down).
ATTENTION_30B = (2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)
EXPERT_30B = (2048 + 2 * 768) + (768 + 2048)
LORA_30B = 48 * 256 * ATTENTION_30B + 48 * 128 * 32 * EXPERT_30B
MAGNITUDES_30B = 48 * (4096 + 2 * 512 + 2048) + 48 * 128 * (2 * 768 + 2048)
ATTENTION_235B = (4096 + 8192) + 2 * (4096 + 512) + (8192 + 4096)
ATTENTION_AIR = (4096 + 12_288) + 2 * (4096 + 1024) + (12_288 + 4096)
ATTENTION_OSS = (2880 + 4096) + 2 * (2880 + 512) + (4096 + 2880)
EXPERT_OSS = (2880 + 2 * 2880) + (2880 + 2880)
ATTENTION_FLASH = (2048 + 768) + (768 + 5120) + (2048 + 576) + (512 + 8960) + (5120 + 2048)
NUM_ADAPTER_PARAMETERS = {
    "qwen3_30b_a3b_lora": LORA_30B,
    "qwen3_30b_a3b_lora_fp8": LORA_30B,
    "qwen3_30b_a3b_dora": LORA_30B + MAGNITUDES_30B,
    "qwen3_30b_a3b_dora_fp8": LORA_30B + MAGNITUDES_30B,
    "qwen3_235b_a22b_lora": 94 * 256 * ATTENTION_235B + 94 * 128 * 32 * (4096 + 2 * 1536 + 1536 + 4096),
    "glm4_5_air_lora": 46 * 256 * ATTENTION_AIR
    + 256 * 3 * (4096 + 10_944)  # the dense layer
    + 45 * 256 * 3 * (4096 + 1408)  # shared experts: the whole rank
    + 45 * 128 * 32 * (4096 + 2 * 1408 + 1408 + 4096),
    "gpt_oss_20b_lora": 24 * 256 * ATTENTION_OSS + 24 * 32 * 64 * EXPERT_OSS,
    "gpt_oss_120b_lora": 36 * 256 * ATTENTION_OSS + 36 * 128 * 64 * EXPERT_OSS,
    "qwen3_32b_lora": 64 * 256 * (2 * (5120 + 8192) + 2 * (5120 + 1024) + 3 * (5120 + 25_600)),
    "qwen2_5_72b_lora": 80 * 256 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 29_568)),
    "llama3_1_70b_lora": 80 * 256 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28_672)),
    "llama3_1_8b_qlora": 167_772_160,  # as reported
    "qwen3_30b_a3b_qlora": 53_477_376 + 48 * 128 * 8 * EXPERT_30B,  # as reported, and experts
    "qwen3_coder_30b_a3b_fp8_lora": 48 * 16 * ATTENTION_30B + 48 * 128 * 2 * EXPERT_30B,
    "glm4_7_flash_fp8_lora": 47 * 16 * ATTENTION_FLASH
    + 16 * 3 * (2048 + 10_240)
    + 46 * 16 * 3 * (2048 + 1536)
    + 46 * 64 * 4 * (2048 + 2 * 1536 + 1536 + 2048),
}


def text_of(name: str) -> str:
    return (CHECKOUT / "train_configs" / f"{name}.toml").read_text()


def test_no_recipe_is_left_out() -> None:
    files = {path.stem for path in (CHECKOUT / "train_configs").glob("*.toml")}
    assert {name for name in files if not name.startswith("debug_")} == RECIPES.keys() | BASES
    assert RECIPES.keys() == NUM_ADAPTER_PARAMETERS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_of_its_size(name: str) -> None:
    assert not resolve(["--job.config_file", f"{name}.toml"]).notes, "sets nothing that has no effect"
    recipe, built = RECIPES[name], build(name)
    assert built.numel == num_parameters(get_family(recipe.family).flavor(recipe.flavor)).total
    assert built.num_adapter_parameters == NUM_ADAPTER_PARAMETERS[name]
    assert built.config.job.dump_folder == f"./outputs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_there_is_room_on_the_gpus(name: str) -> None:
    """A tenth of the memory, or more, is left for what a layer computes."""
    recipe, built = RECIPES[name], build(name)
    assert built.gpu_bytes < 0.9 * recipe.gpu_gb * 1e9
    text = text_of(name)
    assert set(re.findall(r"NGPU=(\d+)", text)) == {str(recipe.num_gpus)}
    assert set(re.findall(r"of (\d+) GB", text)) <= {str(recipe.gpu_gb), "141"}


def test_host_memory_is_needed_where_it_is_used() -> None:
    built = build("qwen3_235b_a22b_lora")
    assert built.weight_bytes + built.learning_bytes + built.gpu_bytes > 80e9
    assert 8 * (built.weight_bytes + built.learning_bytes) < 600e9  # of the host
    without = build("qwen3_235b_a22b_lora", "--training.no_enable_cpu_offload")
    assert without.gpu_bytes < 0.9 * 141e9
    fp8 = ("--training.no_enable_cpu_offload", "--model.converters=quantize.frozen.float8,lora")
    assert build("qwen3_235b_a22b_lora", *fp8).gpu_bytes < 0.9 * 80e9


def _as_reported(name: str, part: str) -> int:
    """Adapters of a part, as systems count that have an A each for gate and up."""
    adapters = {path: numel for path, numel in build(name).adapters.items() if part in path}
    return sum(numel * (2 if path.endswith("gate_up_lora_a") else 1) for path, numel in adapters.items())


@pytest.mark.parametrize(
    ("name", "part", "billions"),
    [
        ("qwen3_30b_a3b_lora", ".experts.", "1.66B"),
        ("qwen3_30b_a3b_lora", ".attention.", "214M"),  # 0.21 B
        ("glm4_5_air_lora", ".experts.", "3.04B"),
    ],
)
def test_adapters_are_those_reported(name: str, part: str, billions: str) -> None:
    assert format_count(_as_reported(name, part)) == billions


def test_parameters_are_those_reported_of_qlora() -> None:
    built = build("llama3_1_8b_qlora")
    total = built.numel + built.num_adapter_parameters
    assert f"{total / 1e9:.3f}" == "8.198" and f"{built.num_adapter_parameters / total:.2%}" == "2.05%"
    attention_alone = build("qwen3_30b_a3b_qlora", "--lora.target_modules=attention")
    assert attention_alone.num_adapter_parameters == 53_477_376


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("qwen3_30b_a3b_lora", {"q_proj": 256, "experts": 32}),
        ("glm4_5_air_lora", {"q_proj": 256, "shared_experts.down_proj": 256, "moe.experts": 32}),
        ("gpt_oss_120b_lora", {"q_proj": 256, "experts": 64}),
    ],
)
def test_shared_experts_have_the_whole_rank(name: str, ranks: dict[str, int]) -> None:
    recipe, built = RECIPES[name], build(name)
    spec = get_family(recipe.family).flavor(recipe.flavor)
    moe = spec.layers[-1].feed_forward
    last = f"layers.{len(spec.layers) - 1}."
    found = {path.removeprefix(last): numel for path, numel in built.adapters.items() if path.startswith(last)}
    inputs = {"q_proj": ("attention.q_proj.lora_a", spec.dim)}
    inputs |= {"shared_experts.down_proj": ("moe.shared_experts.down_proj.lora_a", moe.hidden_dim)}
    inputs |= dict.fromkeys(("experts", "moe.experts"), ("moe.experts.gate_up_lora_a", moe.num_experts * spec.dim))
    assert {part: found[inputs[part][0]] // inputs[part][1] for part in ranks} == ranks


def test_fp8_releases_stay_as_they_are() -> None:
    coder, flash = build("qwen3_coder_30b_a3b_fp8_lora"), build("glm4_7_flash_fp8_lora")
    assert "layers.{0-47}.moe.experts" in coder.table and "{" not in coder.table.partition("moe.experts")[2].split()[0]
    rows = {line.split()[0]: line for line in flash.table.splitlines()}
    assert "frozen FP8 + LoRA" in rows["layers.{2-38,40-45}.moe.experts"]
    assert "FP8" not in rows["layers.{1,39,46}.moe.experts"]
    # Of 39.7 GB reported at most.
    assert coder.gpu_bytes < 39.7e9


def test_the_table_of_the_documentation_is_right() -> None:
    page = (CHECKOUT / "docs" / "workloads.md").read_text()
    for name, recipe in RECIPES.items():
        built = build(name)
        numels = format_count(built.numel), format_count(built.num_adapter_parameters)
        sizes = f"{built.weight_bytes / 1e9:.1f} GB", f"{built.learning_bytes / 1e9:.1f} GB"
        row = (f"`{name}.toml`", f"{recipe.num_gpus} x {recipe.gpu_gb} GB", *numels, *sizes)
        assert f"| {' | '.join(row)} |\n" in page


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(f"{name}.toml")
    with pytest.raises(ConfigError, match=r"model.hf_assets_path.*does not exist") as error:
        validate(config, RECIPES[name].num_gpus)
    assert str(config.model.hf_assets_path) in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() | BASES))
def test_options_in_comments_are_understood(name: str) -> None:
    comments = " ".join(line[1:] for line in text_of(name).splitlines() if line.startswith("#"))
    for option in re.findall(r'--[a-z_]+\.[a-z_.]+(?:=(?:"[^"]*"|[^\s:]+))?', comments):
        if option != "--job.config_file":
            resolve(["--job.config_file", f"{name}.toml", option.replace('"', "").rstrip(".,")])
