"""How a base model is loaded: options and what they come to, machines that lack something, and what folders note."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig, TrainingArguments

from softtune import ConfigError, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from softtune.backbone import Backbone
from softtune.cli.flags import LOAD_FLAGS
from softtune.data import Example
from softtune.errors import MissingExtraError, SofttuneError
from softtune.evaluation.predict import score_head, score_spans, score_tokens, write_texts
from softtune.load_options import LoadFields, own_quantization
from softtune.pretrained import LoadOptions, load_base_model
from softtune.serving.bases import Bases
from softtune.serving.sampling import SamplingParams
from softtune.serving.service import Service
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.trainer import training_arguments
from tests.tiny import recipe_fields, save_models

OTHER_DTYPE = "was trained on its base model in bfloat16, which is in float32 now: expect somewhat other outputs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has two CUDA GPUs, without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("softtune.load_options.has_bfloat16", lambda device: device.type != "cuda")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4': it should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"device": "tpu"}, "device is 'tpu': use auto, cpu, cuda, cuda:1 and so on, mps or xpu"),
        ({"device": "cpu:1"}, "device is 'cpu:1': use auto, cpu"),
        ({"quantization": "int3"}, "quantization is 'int3': it should be 'bnb-4bit', 'bnb-8bit', 'torchao-int8' or "),
        ({"device": "cpu", "device_map": "auto"}, "device_map says where the base model is: drop device, or device_m"),
        ({"max_memory": {0: "1GB"}}, "max_memory bounds a device_map: set device_map to auto, or drop max_memory"),
        ({"quantization": "torchao-int4", "dtype": "float32"}, "torchao-int4 computes in bfloat16: drop dtype"),
        ({"torch_dtype": "auto"}, "torch_dtype: no such option: use one of dtype, device, device_map, max_memory, "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoadOptions(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    if "torch_dtype" not in fields:
        needed = {"model": "m", "train": "t", "template": "{a}", "label_column": "b", "output": "o"}
        with pytest.raises(ConfigError, match="recipe: "):
            Recipe.from_fields({**needed, **fields})


def test_options_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        LoadOptions().dtype = "float32"


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=r"^no CUDA here: use device cpu, or install a torch for cuda$"):
            LoadOptions(device=name).check_machine()
    assert LoadOptions().torch_device == torch.device("cpu")


def test_devices_that_are_there(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoadOptions().torch_device == LoadOptions(device="cuda").torch_device == torch.device("cuda:0")
    assert LoadOptions(device="cuda:1").torch_device == torch.device("cuda:1")
    assert LoadOptions(device="cpu").torch_device == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^no cuda:2 here: use one of cuda:0, cuda:1$"):
        LoadOptions(device="cuda:2").check_machine()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert LoadOptions().torch_device == torch.device("cuda:1")
    assert LoadOptions(device="cuda:0").torch_device == torch.device("cuda:0")


def test_a_gpu_without_bfloat16(two_gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"^cuda:0 does not compute in bfloat16: use dtype float16 or float32$"):
        LoadOptions(dtype="bfloat16").check_machine()
    with pytest.raises(ConfigError, match="cuda:0 does not compute in bfloat16: torchao-int4 needs it, use bnb-4bit"):
        LoadOptions(quantization="torchao-int4").check_machine()
    LoadOptions(dtype="float16").check_machine()
    assert LoadOptions().arguments(LlamaConfig(dtype=torch.bfloat16))["dtype"] == torch.float32
    assert LoadOptions().arguments(LlamaConfig(dtype=torch.float16))["dtype"] == "auto"


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
def test_a_quantisation_whose_package_is_missing(
    name: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "bitsandbytes" if name.startswith("bnb") else "torchao"
    monkeypatch.setattr("softtune.load_options.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        load_base_model(models["llama"], options=LoadOptions(quantization=name))
    assert str(caught.value) == f"a quantised base model needs {package}: pip install 'softtune[quant]'"


def test_four_bits_of_torchao_are_for_gpus(models: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="torchao-int4 does not run on cpu: use quantization bnb-4bit, or torchao-i"):
        load_base_model(models["llama"], options=LoadOptions(quantization="torchao-int4", device="cpu"))


def test_what_transformers_is_told(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes in fp32, and what is not on it is loaded where it goes."""
    config = LlamaConfig(dtype=torch.float16)
    assert LoadOptions().arguments(config) == {"dtype": "auto", "device_map": {"": "cuda:0"}}
    assert LoadOptions(device="cpu").arguments(config) == {"dtype": torch.float32}
    bf16 = LoadOptions(device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert bf16.arguments(config) == {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    spread = LoadOptions(device_map="auto", max_memory={"0": "1GB", "cpu": 5})
    assert spread.arguments(config) == {"dtype": "auto", "device_map": "auto", "max_memory": {0: "1GB", "cpu": 5}}
    assert LoadOptions(revision="v1").hub == {"revision": "v1", "trust_remote_code": False}
    four_bits = LoadOptions(device="cpu", quantization="bnb-4bit").arguments(config)
    monkeypatch.undo()
    assert four_bits["device_map"] == {"": "cpu"}
    asked = four_bits["quantization_config"]
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_compute_dtype) == ("nf4", torch.float32)


def test_a_checkpoint_that_is_quantised_loads_as_it_comes() -> None:
    config = PretrainedConfig(quantization_config={"quant_method": "gptq", "bits": 4}, dtype=torch.float16)
    assert LoadOptions(device="cpu").arguments(config) == {"dtype": "auto", "device_map": {"": "cpu"}}
    with pytest.raises(ConfigError, match="the base model is quantised already, by gptq: drop quantization"):
        LoadOptions(device="cpu", quantization="bnb-4bit").arguments(config)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-8bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_names_of_quantisations(fields: dict[str, Any], name: str) -> None:
    assert own_quantization(PretrainedConfig(quantization_config=fields)) == name
    assert own_quantization(PretrainedConfig()) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_model_in_each_dtype(dtype: str, models: dict[str, str]) -> None:
    base, _ = load_base_model(models["llama"], options=LoadOptions(dtype=dtype, device="cpu"))
    assert base.dtype == getattr(torch, dtype)
    assert not base.training


def test_the_default_on_a_cpu_is_fp32_whatever_the_checkpoint(models: dict[str, str], tmp_path: Path) -> None:
    base, tokenizer = load_base_model(models["llama"], options=LoadOptions(dtype="bfloat16", device="cpu"))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_base_model(str(tmp_path), options=LoadOptions(device="cpu"))[0].dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map(device_map: Any, models: dict[str, str]) -> None:
    base, _ = load_base_model(models["llama"], options=LoadOptions(device_map=device_map))
    plain, _ = load_base_model(models["llama"], options=LoadOptions(device="cpu"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(base(ids.to(base.device)).logits.cpu().float(), plain(ids).logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_no_room_for_the_base_model(
    error: Exception, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ConfigError) as caught:
        load_base_model(models["llama"], options=LoadOptions(device="cpu"))
    line = "has no room in the memory of cpu: use dtype bfloat16, quantization bnb-4bit, or device_map auto, which "
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_load_stay_what_they_are(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load_base_model(models["llama"])


def test_an_attention_function_that_is_not_there(models: dict[str, str]) -> None:
    with pytest.raises(SofttuneError) as caught:
        load_base_model(models["llama"], options=LoadOptions(attn_implementation="none_such", device="cpu"))
    assert "attn_implementation" in str(caught.value)
    assert "\n" not in str(caught.value)
    base, _ = load_base_model(models["llama"], options=LoadOptions(attn_implementation="eager", device="cpu"))
    assert base.config._attn_implementation == "eager"


def test_code_that_comes_with_a_model_does_not_run(models: dict[str, str], tmp_path: Path) -> None:
    load_base_model(models["llama"])[1].save_pretrained(tmp_path)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match="comes with code of its own: set trust_remote_code if you trust who wrote"):
        load_base_model(str(tmp_path))
    with pytest.raises(SystemExit, match="it ran"):
        load_base_model(str(tmp_path), options=LoadOptions(trust_remote_code=True))


def test_a_recipe_in_bfloat16(models: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe.from_fields(recipe_fields(models["llama"], tmp_path, dtype="bfloat16", epochs=4))
    report = train(recipe)
    steps = json.loads((report.folder / "history.json").read_text())["default"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert report.after["accuracy"] >= 0.5
    notes = json.loads((report.folder / "softtune_config.json").read_text())
    assert (notes["base_model_dtype"], notes["base_model_quantization"]) == ("bfloat16", None)
    assert Recipe.from_adapter(report.folder).inference_load_options() == LoadOptions(dtype="bfloat16")


def test_a_folder_keeps_to_itself_where_it_was_trained() -> None:
    fields = {
        "model": "m",
        "train": "t",
        "template": "{a}",
        "label_column": "b",
        "output": "o",
        "revision": "v1",
        "device_map": "auto",
        "max_memory": {0: "1GB"},
        "trust_remote_code": True,
    }
    recipe = Recipe.from_fields(fields)
    assert recipe.inference_load_options() == LoadOptions(revision="v1")
    assert recipe.inference_load_options(device="cpu", revision=None) == LoadOptions(device="cpu")
    assert recipe.config().revision == "v1"
    assert Recipe.from_fields({**fields, "trust_remote_code": False}).differences(recipe).keys() == {
        "trust_remote_code"
    }
    here = {**fields, "device": "cpu", "device_map": None, "max_memory": None}
    assert not Recipe.from_fields(here).differences(recipe)


def test_a_recipe_for_a_device_that_is_not_there(models: dict[str, str], tmp_path: Path) -> None:
    """Before any data is read."""
    fields = recipe_fields(models["llama"], tmp_path, device="xpu", train="nowhere.csv")
    with pytest.raises(ConfigError, match="no XPU here: use device cpu"):
        train(Recipe.from_fields(fields))


def test_another_dtype_than_trained_with_is_told(models: dict[str, str], tmp_path: Path) -> None:
    rounded, _ = load_base_model(models["llama"], options=LoadOptions(dtype="bfloat16", device="cpu"))
    exact, _ = load_base_model(models["llama"], options=LoadOptions(device="cpu"))
    model = get_peft_model(rounded, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path)
    assert not {*json.loads((tmp_path / "adapter_config.json").read_text())} & {*LoadFields.model_fields} - {"revision"}
    PeftModel.from_pretrained(rounded, tmp_path)
    with pytest.warns(UserWarning, match=OTHER_DTYPE):
        PeftModel.from_pretrained(exact, tmp_path)
    notes = json.loads((tmp_path / "softtune_config.json").read_text())
    old = {name: value for name, value in notes.items() if not name.startswith("base_model_")}
    (tmp_path / "softtune_config.json").write_text(json.dumps(old))
    PeftModel.from_pretrained(exact, tmp_path)  # a folder that does not say
    assert PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == 3
    quantised = {**notes, "base_model_dtype": "float32", "base_model_quantization": "bnb-4bit"}
    (tmp_path / "softtune_config.json").write_text(json.dumps(quantised))
    with pytest.warns(UserWarning, match="in bnb-4bit and float32, which is in float32 now"):
        PeftModel.from_pretrained(exact, tmp_path)


def test_the_command_line_takes_the_options(models: dict[str, str], tmp_path: Path) -> None:
    """In processes of their own, where warnings are shown."""

    def softtune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "import softtune_command; softtune_command.main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    adapter = str(train(Recipe.from_fields(recipe_fields(models["llama"], tmp_path, dtype="bfloat16"))).folder)
    done = softtune("predict", adapter, "--text", "red sky")
    assert (done.returncode, done.stderr.count("softtune: ")) == (0, 0), done.stderr
    done = softtune("predict", adapter, "--text", "red sky", "--dtype", "float32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "softtune" in line or "Warning" in line] == [
        f"softtune: the adapter in {adapter} {OTHER_DTYPE}"
    ]


@pytest.mark.parametrize("name", ["predict", "generate", "inspect", "check", "bake", "serve"])
def test_every_command_has_the_flags(name: str, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    from tests.cli.test_cli import run

    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.replace('_', '-')}" in shown for field in LOAD_FLAGS)
    assert "--fsdp" not in shown  # it is for several processes
    given = {"bake": ["x", "--model", "m", "--to", "t"], "serve": ["--model", models["llama"]]}
    given |= {"check": [models["llama"]]}
    if name in given:
        assert run(name, *given[name], "--device", "xpu") == 2
        assert capsys.readouterr().err.startswith("softtune: no XPU here: ")


def test_memory_that_is_full_is_told_in_one_line(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_cli import run

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("softtune.cli.check.known_task", fail)
    assert run("check", models["llama"]) == 2
    assert capsys.readouterr().err == (
        "softtune: out of memory: lower batch_size, set gradient_checkpointing, or use dtype bfloat16, quantization "
        "bnb-4bit, or device_map auto, which spreads it over all devices\n"
    )


def test_heads_are_scored_in_fp32(models: dict[str, str]) -> None:
    example = [Example(input_ids=[5, 6, 7], labels=[0, 0, 0], truncated=0)]
    for task, score in ((TaskType.SEQ_CLS, score_head), (TaskType.TOKEN_CLS, score_tokens)):
        options = LoadOptions(dtype="bfloat16", device="cpu")
        base, _ = load_base_model(models["bert"], task, num_labels=2, options=options)
        found = score(PeftModel(base).eval(), example, 0)
        assert found[0].dtype == torch.float32
    base, _ = load_base_model(models["bert"], TaskType.QUESTION_ANS, options=options)
    [(first, last)] = score_spans(PeftModel(base).eval(), example, 0)
    assert first.dtype == last.dtype == torch.float32


def test_a_server_in_bfloat16_writes_what_generate_does(models: dict[str, str]) -> None:
    options = LoadOptions(dtype="bfloat16", device="cpu")
    service = Service(models["llama"], options=options)
    assert service.engine.scheduler.pool.device == torch.device("cpu")
    base, tokenizer = load_base_model(models["llama"], options=options)
    ids = tokenizer("red sky is", return_tensors="pt")["input_ids"]
    expected = write_texts(
        PeftModel(base).eval(),
        tokenizer,
        [Example(input_ids=ids[0].tolist(), labels=[], truncated=0)],
        max_new_tokens=6,
        do_sample=False,
    )

    async def write() -> str:
        params = SamplingParams(max_tokens=6)
        return "".join([delta.text async for delta in service.generate(None, ids[0].tolist(), params)])

    service.start()
    try:
        assert asyncio.run(write()).strip() == expected[0]
    finally:
        service.close(0)


def test_bases_share_plain_tensors_and_leave_others(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bases = Bases(models["llama"], LoadOptions(dtype="bfloat16", device="cpu"))
    one, other = bases.model(TaskType.CAUSAL_LM), bases.model(TaskType.SEQ_CLS, 2)
    shared = [model.backbone.embedding.weight.data_ptr() for model in (one, other)]
    assert shared[0] == shared[1]

    def offloaded(*arguments: Any, **options: Any) -> Any:
        base, tokenizer = load_base_model(*arguments, **options)
        return cpu_offload(base, execution_device=torch.device("cpu")), tokenizer

    monkeypatch.setattr("softtune.serving.bases.load_base_model", offloaded)
    spread = Bases(models["llama"])
    spread.model(TaskType.CAUSAL_LM)
    model = spread.model(TaskType.SEQ_CLS, 2)
    assert model.backbone.model.device.type == "meta"
    assert model.device.type == "cpu"


def test_a_server_of_an_offloaded_model_moves_its_inputs(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are on no device, and it computes on the CPU all the same."""
    from softtune.injection.kv_pool import KVPool
    from softtune.methods.prompt import Prompt
    from softtune.serving.sequence import LoadedPrompt, ScheduledChunk, TokenSequence, run_chunks

    base, _ = load_base_model(models["llama"], options=LoadOptions(device="cpu"))
    expected = base(torch.tensor([[5, 6, 7]])).logits[0]
    backbone = Backbone.shared(cpu_offload(base, execution_device=torch.device("cpu")))
    pool = KVPool(backbone, 64)
    prompt = LoadedPrompt.from_prompt(pool, Prompt(num_virtual_tokens=0))
    chunk = ScheduledChunk(sequence=TokenSequence.from_input_ids(prompt, [5, 6, 7]), count=3, keep=3)
    [logits] = run_chunks(backbone, pool, [chunk])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_trainer_computes_on_the_device_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_arguments(tmp_path, torch.device("cpu")).device == torch.device("cpu")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = training_arguments(tmp_path, torch.device("cuda", 1))
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.device, arguments.n_gpu, arguments.use_cpu) == (torch.device("cuda:1"), 1, False)
    assert chosen[-1] == torch.device("cuda:1")
    assert training_arguments(tmp_path).device == torch.device("cpu")


def test_recipes_at_once_share_how_their_base_model_is_loaded(models: dict[str, str], tmp_path: Path) -> None:
    from softtune.training.compatibility import check_compatible

    (tmp_path / "a").mkdir()
    recipes = [
        Recipe.from_fields(recipe_fields(models["llama"], tmp_path, output=str(tmp_path / name), **changes))
        for name, changes in (("x", {}), ("y", {"dtype": "bfloat16"}))
    ]
    with pytest.raises(ConfigError, match=r"dtype is 'auto' for .*x and 'bfloat16' for .*y: recipes that run at once"):
        check_compatible(recipes)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_bitsandbytes(name: str, models: dict[str, str], tmp_path: Path) -> None:
    _quantised(name, models, tmp_path)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")  # of torchao, as it is imported
def test_torchao(models: dict[str, str], tmp_path: Path) -> None:
    _quantised("torchao-int8", models, tmp_path)


def _quantised(name: str, models: dict[str, str], folder: Path) -> None:
    """A base model is quantised, nearly the same, and an adapter's folder notes it."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=17, pad_token_id=0, eos_token_id=1, **sizes))
    wide.save_pretrained(folder / "wide")
    load_base_model(models["llama"])[1].save_pretrained(folder / "wide")
    base, _ = load_base_model(str(folder / "wide"), options=LoadOptions(quantization=name, device="cpu"))
    plain, _ = load_base_model(str(folder / "wide"), options=LoadOptions(device="cpu"))
    assert own_quantization(base.config) == name
    assert type(base.lm_head) is torch.nn.Linear
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, expected = base(ids).logits, plain(ids).logits
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.5
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(folder)
    assert json.loads((folder / "softtune_config.json").read_text())["base_model_quantization"] == name
    with pytest.warns(UserWarning, match=f"in {name} and float32, which is in float32 now"):
        PeftModel.from_pretrained(plain, folder)
    options = LoadOptions(quantization=name, device="cpu")
    judge, _ = load_base_model(models["bert"], TaskType.SEQ_CLS, num_labels=2, options=options)
    assert type(judge.classifier) is torch.nn.Linear
    assert judge.classifier.weight.is_floating_point()
