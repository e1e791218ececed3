"""A model with spread experts: what it computes and what it refuses, in one process with a pool of host memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.groups import PAGE
from support.moe_models import logits, prompt, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedModel

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.checkpoint import SINGLE_FILE, Checkpoint
from vmm_dwdp.integrations.transformers import attach, from_pretrained
from vmm_dwdp.integrations.transformers.experts import FIRST, find_experts

ALONE = DWDPConfig(group_size=1, host_experts=5)
IN_PLACE = DWDPConfig(group_size=1, host_experts=5, mode="in_place", prefetch_depth=0)
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    with DWDPRuntime(ALONE, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)) as runtime:
        yield runtime
    assert runtime.ledger.open() == []


@pytest.fixture
def model(runtime: DWDPRuntime) -> PreTrainedModel:
    """A spread model."""
    model = tiny_model("qwen3_moe")
    attach(model, runtime)
    return model


# -- which modules hold experts --------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class GroupedExpertsLinear(Experts):
    pass


def test_experts_are_told_by_name_and_shape() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 4, 3),
            "experts": Experts(up=(6, 3, 2), up_bias=(6, 3), scale=(6,), gate=(3, 3), squares=(6, 2, 2, 2)),
            "fc": GroupedExpertsLinear(weight=(5, 2, 2)),
            "shared_experts": Experts(up=(2, 3, 2)),
            "flat_experts": Experts(up=(6, 3)),
        }
    )
    found = {experts.path: set(experts.weights) for experts in find_experts(model)}
    assert found == {"experts": {"up", "up_bias", "squares"}, "fc": {"weight"}}


@pytest.mark.parametrize(
    ("module", "named"), [(Experts(up=(6, 3, 2), down=(5, 2, 3)), r"up \[6, 3, 2\]"), (nn.Linear(2, 2), "ModuleDict")]
)
def test_a_model_without_stacked_experts_is_refused(module: nn.Module, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        find_experts(nn.ModuleDict({"experts": module}))


# -- what the model computes -----------------------------------------------------------------------------------------


def test_logits_and_text_are_those_of_the_whole_model(model: PreTrainedModel) -> None:
    whole = tiny_model("qwen3_moe")
    assert torch.equal(logits(model), logits(whole))
    with torch.inference_mode():
        assert torch.equal(model(prompt()).logits, whole(prompt()).logits)
    generated = [each.generate(prompt()[:1], max_new_tokens=8, do_sample=False) for each in (model, whole)]
    assert torch.equal(*generated)
    assert model.dwdp.stats().fetched_bytes > 0
    assert model.num_parameters() == whole.num_parameters()


def test_weights_may_be_read_in_place(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with DWDPRuntime(IN_PLACE, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)) as runtime:
        attach(model, runtime)
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))
        assert runtime.stats().fetched_bytes == 0


def test_a_forward_pass_of_few_tokens_reads_in_place_where_the_mode_is_auto(tmp_path: Path) -> None:
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    config = DWDPConfig(group_size=1, host_experts=5, mode="auto")
    with DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)) as runtime:
        attach(model, runtime)
        many, one = torch.arange(64)[None], torch.zeros((1, 1), dtype=torch.long)
        with torch.no_grad():
            assert torch.equal(model(many).logits, whole(many).logits)
            assert runtime.stats().in_place == 0
            assert torch.equal(model(one).logits, whole(one).logits)
        assert runtime.stats().in_place == len(runtime.stats().layers)


def test_passes_fill_a_resident_cache_by_themselves(tmp_path: Path) -> None:
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    config = DWDPConfig(group_size=1, host_experts=5, mode="in_place", resident_cache=16 * PAGE)
    with DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)) as runtime:
        attach(model, runtime)
        with torch.no_grad():
            expected = whole(prompt()).logits
            refreshes = []
            for _ in range(FIRST + 2 * FIRST + 1):
                assert torch.equal(model(prompt()).logits, expected)
                cache = runtime.stats().cache
                assert cache is not None
                refreshes.append(cache.refreshes)
        assert [refreshes.index(1), refreshes.index(2)] == [FIRST, 3 * FIRST]
        assert cache.used_bytes == cache.nbytes == 16 * PAGE
        assert 0 < (cache.served or 0) < 1


def test_experts_implementations_of_transformers_are_left_to_it(runtime: DWDPRuntime) -> None:
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    attach(model, runtime)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for each in (whole, model):
            each.set_experts_implementation(implementation)
        assert torch.equal(logits(model), logits(whole)), implementation


def test_a_compiled_model_runs_its_experts_as_they_are(runtime: DWDPRuntime) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    expected = logits(model)
    attach(model, runtime)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(prompt(), use_cache=False).logits, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_raises_lets_go_of_its_layer(model: PreTrainedModel, error: type[BaseException]) -> None:
    expected = logits(model)
    experts = model.get_submodule(EXPERTS)
    with mock.patch.object(experts.act_fn, "forward", side_effect=error), pytest.raises(error):
        logits(model)
    assert all(parameter.is_meta for parameter in experts.parameters())
    assert torch.equal(logits(model), expected)


def test_a_closed_runtime_is_named(model: PreTrainedModel) -> None:
    model.dwdp.close()
    with pytest.raises(StateError, match="closed"):
        logits(model)


# -- what it refuses -------------------------------------------------------------------------------------------------


def test_only_meta_parameters_outside_a_forward_pass(model: PreTrainedModel) -> None:
    logits(model)
    spread = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert spread == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")
    ]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, path: model.state_dict(),
        lambda model, path: model.save_pretrained(path),
        lambda model, path: model.load_state_dict(tiny_model("qwen3_moe").state_dict()),
        lambda model, path: copy.deepcopy(model),
        lambda model, path: pickle.dumps(model),
        lambda model, path: torch.save(model, path / "model.pt"),
        lambda model, path: model.half(),
        lambda model, path: model.to(torch.bfloat16),
        lambda model, path: model.to("meta"),
        lambda model, path: model.get_submodule(EXPERTS).double(),
    ],
)
def test_what_would_leave_out_move_or_copy_the_experts_is_refused(
    model: PreTrainedModel, tmp_path: Path, use: Callable[[PreTrainedModel, Path], Any]
) -> None:
    expected = logits(model)
    with pytest.raises(StateError, match=r"model\.layers\.[01]\.mlp\.experts"):
        use(model, tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), expected)


def test_moving_to_where_it_is_does_nothing(model: PreTrainedModel) -> None:
    expected = logits(model)
    assert model.to("cpu").float().to(torch.float32) is model
    assert torch.equal(logits(model), expected)


def test_a_backward_pass_is_refused(model: PreTrainedModel) -> None:
    """And nothing is kept for it: the memory of the experts can be freed while the loss is still there."""
    loss = model(prompt(), labels=prompt()).loss
    with pytest.raises(StateError, match=r"backward pass reaches model\.layers\.2\.mlp\.experts"):
        loss.backward()
    assert model.dwdp.close().open() == []


# -- loading ---------------------------------------------------------------------------------------------------------


def load(directory: Path, config: DWDPConfig = ALONE, rank: int = 0, **kwargs: Any) -> PreTrainedModel:
    return from_pretrained(
        directory,
        config,
        rank=rank,
        device="cpu",
        rendezvous=directory / "rendezvous",
        driver=HostDriver(PAGE),
        **kwargs,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def test_from_pretrained_gives_an_ordinary_model_and_no_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(saved)
    with model.dwdp:
        assert type(model) is type(tiny_model("qwen3_moe"))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training
        assert model.name_or_path == str(saved)
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))
    assert not caplog.records


def test_experts_are_read_in_the_dtype_in_which_transformers_loads_them(saved: Path) -> None:
    model_class = type(tiny_model("qwen3_moe"))
    with mock.patch.object(model_class, "_keep_in_fp32_modules_strict", ["experts.down"]):
        whole = model_class.from_pretrained(saved, dtype=torch.bfloat16)
        model = load(saved, dtype=torch.bfloat16)
    with model.dwdp:
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes == {name: parameter.dtype for name, parameter in whole.named_parameters()}
        assert dtypes[f"{EXPERTS}.down_proj"] == torch.float32


def without_an_expert(directory: Path) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    del tensors[f"{EXPERTS}.2.up_proj.weight"]
    save_file(tensors, directory / SINGLE_FILE)


def with_config(old: str, new: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(file.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without_an_expert, f"{EXPERTS}.2.up_proj.weight"),
        (lambda directory: (directory / SINGLE_FILE).unlink(), SINGLE_FILE),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
        (with_config("Qwen3MoeForCausalLM", "NoSuchModel"), "NoSuchModel"),
        (with_config("{", '{"quantization_config": {"quant_method": "awq"},'), "quantised"),
    ],
)
@pytest.mark.usefixtures("open_descriptors")
def test_a_checkpoint_that_cannot_be_is_refused(saved: Path, spoil: Callable[[Path], object], named: str) -> None:
    spoil(saved)
    with pytest.raises(ConfigError, match=named):
        load(saved)


def test_arguments_that_contradict_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="device_map"):
        load(saved, device_map="auto")


def test_a_pipeline_runs_a_spread_model(model: PreTrainedModel) -> None:
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()

    def said(model: PreTrainedModel) -> str:
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=wrapped)
        (answer,) = pipe("w3 w4 w5", max_new_tokens=4, do_sample=False)
        return str(answer["generated_text"])

    assert said(model) == said(tiny_model("qwen3_moe"))


@pytest.mark.parametrize(("rank", "own"), [(0, {0, 1, 2, 3, 5, 6}), (1, {1, 2, 3, 4})])
def test_a_rank_reads_its_own_experts_and_leaves_nothing_when_another_does_not_come(
    saved: Path, rank: int, own: set[int]
) -> None:
    """The experts of the host pool are read by rank 0, which creates it."""
    read: list[str] = []

    def recording(checkpoint: Checkpoint, name: str, row: int | None = None) -> Tensor:
        read.append(name)
        return whole_read(checkpoint, name, row)

    whole_read = Checkpoint.read
    config = DWDPConfig(group_size=2, num_local_experts=4, host_experts=2)
    with mock.patch.object(Checkpoint, "read", recording), pytest.raises(ExchangeError, match=f"rank {1 - rank}"):
        load(saved, config, rank, timeout=0.1)
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in read} == own
    assert len(read) == len(set(read)) == len(own) * 3 * 3  # gate, up and down of three layers, each once


@pytest.mark.parametrize(
    ("model", "config", "error"),
    [
        (tiny_model("qwen3_moe"), DWDPConfig(group_size=2), ExchangeError),
        (tiny_model("qwen3_moe"), DWDPConfig(group_size=1, host_experts=8), ConfigError),
        (tiny_model("qwen3_moe").to("meta"), ALONE, ConfigError),
        (nn.Linear(2, 2), ALONE, ConfigError),
    ],
)
def test_an_attach_that_fails_leaves_the_model_as_it_was(
    tmp_path: Path, model: Any, config: DWDPConfig, error: type[Exception]
) -> None:
    runtime = DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE))
    before: dict[str, Tensor] = dict(model.named_parameters())
    with pytest.raises(error):
        attach(model, runtime, timeout=0.1)
    assert runtime.ledger.open() == []
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
