#!/usr/bin/env bash
# The guess: prefix tuning of PEFT on an encoder that takes no cache either acts or says that it cannot. For sequence
# classification, token classification and question answering it does say so: ValueError, the model does not support past
# key values. What happens for feature extraction: DeBERTa-v2, DeBERTa and MPNet are wrapped and run, the prefix's
# parameters are reported as trainable, and the outputs are the base model's to the last bit, so that no prefix is ever
# trained. Sentence embedding models are adapted by this task type.
# peft 0.21.2, transformers 5.24.0 (5.17.0 is the same), torch 2.13.0 (CPU), Python 3.11; seen 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch
import transformers
from transformers import (
    DebertaConfig, DebertaModel, DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Model, MPNetConfig, MPNetModel
)

size = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}
ids = torch.arange(3, 10)[None]
print(f"peft {peft.__version__}, transformers {transformers.__version__}")


def wrapped(model, task):
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    for parameter in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return adapted


for config, model in ((DebertaV2Config, DebertaV2Model), (DebertaConfig, DebertaModel), (MPNetConfig, MPNetModel)):
    torch.manual_seed(0)
    base = model(config(**size)).eval()
    with torch.no_grad():
        expected = base(input_ids=ids)[0]
        found = wrapped(base, "FEATURE_EXTRACTION")(input_ids=ids)[0]
    print(f"{model.__name__}: a random prefix moves the outputs by {float((found - expected).abs().max())}")
    assert torch.equal(found, expected), "the prefix acts now"
try:
    wrapped(DebertaV2ForSequenceClassification(DebertaV2Config(**size)), "SEQ_CLS")(input_ids=ids)
except ValueError as error:
    print(f"sequence classification: {error}")
else:
    raise AssertionError("sequence classification says nothing now")
PYTHON
