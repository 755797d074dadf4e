"""Does a prefix change ``generate``? Compares PEFT and softtune on tiny random models: pip install peft, then run this.

With transformers 5.24 and PEFT 0.21.2 the first column is 0: the text is the base model's.
"""

import importlib.metadata
import warnings

import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedModel, Qwen3Config

import softtune

try:
    import peft
except ImportError:
    raise SystemExit("this compares with PEFT: pip install peft") from None

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = [
    LlamaConfig(**SIZES, intermediate_size=64),
    Qwen3Config(**SIZES, intermediate_size=64, head_dim=8, num_key_value_heads=2),
    BloomConfig(**SIZES),
]
TEXT = torch.tensor([[5, 6, 7, 8]])


def scores(model: torch.nn.Module) -> torch.Tensor:
    """The logits of four generated tokens."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(TEXT)
    return torch.stack(model.generate(input_ids=TEXT, attention_mask=mask, pad_token_id=0, **settings).logits)


def moved(library: object, base: PreTrainedModel) -> float:
    """Largest change of the logits by a random prefix of a library."""
    expected = scores(base)
    torch.manual_seed(1)
    options = {"init_weights": "random"} if library is softtune else {}
    config = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)
    model = library.get_peft_model(base, config).eval()
    return float((scores(model) - expected).abs().max())


def main() -> None:
    """Print a line for each model."""
    warnings.filterwarnings("ignore")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    print(*(f"{name} {version}" for name, version in versions.items()), sep=", ")
    print(f"{'how far a prefix moves generated scores':45}{'PEFT':>10}{'softtune':>10}")
    for config in CONFIGS:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).eval()
        found = [moved(peft, base), moved(softtune, AutoModelForCausalLM.from_config(config).eval())]
        print(f"{type(base).__name__:45}" + "".join(f"{x:10.3f}" for x in found))


if __name__ == "__main__":
    main()
