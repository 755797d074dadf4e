"""Prompt tuning initialized from a text: eight virtual tokens start as the embeddings of an instruction.

python examples/prompt_tuning.py train.csv
"""

from __future__ import annotations

import torch
from prefix_tuning import train
from torch.utils.data import DataLoader
from transformers import default_data_collator
from twitter_complaints import BATCH_SIZE, arguments, load, preprocess, run

from softtune import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from softtune.pretrained import load_base_model


def main() -> None:
    args = arguments("Prompt tuning from a text.")
    records = load(args.data)
    base, tokenizer = load_base_model(args.model)
    data = preprocess(records, tokenizer, pad=True)
    train_batches = DataLoader(data["train"], shuffle=True, collate_fn=default_data_collator, batch_size=BATCH_SIZE)
    eval_batches = DataLoader(data["test"], collate_fn=default_data_collator, batch_size=BATCH_SIZE)

    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text="Classify if the tweet is a complaint or not:",
        num_virtual_tokens=8,
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    train(model, train_batches, eval_batches, epochs=args.epochs)
    model.save_pretrained(args.output)

    model = PeftModel.from_pretrained(model.get_base_model(), args.output)
    inputs = tokenizer("Tweet text : @shop thank you, that was quick! Label :", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    run(main)
