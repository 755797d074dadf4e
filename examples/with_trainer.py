"""Prompt tuning and P-tuning with Hugging Face's Trainer and collator.

python examples/with_trainer.py train.csv
"""

from __future__ import annotations

import math

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from twitter_complaints import BATCH_SIZE, LENGTH, arguments, load, preprocess, run

from softtune import PeftConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from softtune.pretrained import load_base_model

CONFIGS: dict[str, PeftConfig] = {
    "prompt_tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8),
    "p_tuning": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8, encoder_hidden_size=128),
}


def main() -> None:
    args = arguments("Prompt tuning and P-tuning with the Trainer.")
    records = load(args.data)
    base, tokenizer = load_base_model(args.model)
    tokenizer.padding_side = "left"
    data = preprocess(records, tokenizer, pad=False)
    for name, config in CONFIGS.items():
        model = get_peft_model(base, config)
        model.print_trainable_parameters()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=f"{args.output}/{name}",
                learning_rate=3e-2,
                lr_scheduler_type="linear",
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=BATCH_SIZE,
                num_train_epochs=args.epochs,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                logging_strategy="epoch",
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=LENGTH),
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        print(f"{name}: eval loss {loss:.4f}, perplexity {math.exp(loss):.4f}")
        model.save_pretrained(f"{args.output}/{name}")

        loaded = PeftModel.from_pretrained(base, f"{args.output}/{name}")
        inputs = tokenizer("Tweet text : @bus an hour late again! Label :", return_tensors="pt")
        with torch.no_grad():
            written = loaded.generate(**inputs, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id)
        print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    run(main)
