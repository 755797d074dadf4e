"""Prefix tuning with a projection: train, evaluate, save, load, generate.

python examples/prefix_tuning.py train.csv
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import default_data_collator, get_linear_schedule_with_warmup
from twitter_complaints import BATCH_SIZE, arguments, load, preprocess, run

from softtune import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from softtune.pretrained import load_base_model

VIRTUAL_TOKENS = 30
LEARNING_RATE = 3e-2


def main() -> None:
    args = arguments("Prefix tuning with a projection.")
    records = load(args.data)
    base, tokenizer = load_base_model(args.model)
    data = preprocess(records, tokenizer, pad=True)
    train_batches = DataLoader(data["train"], shuffle=True, collate_fn=default_data_collator, batch_size=BATCH_SIZE)
    eval_batches = DataLoader(data["test"], collate_fn=default_data_collator, batch_size=BATCH_SIZE)

    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS, prefix_projection=True)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    train(model, train_batches, eval_batches, epochs=args.epochs)
    model.save_pretrained(args.output)

    model = PeftModel.from_pretrained(model.get_base_model(), args.output)
    inputs = tokenizer("Tweet text : @bank my card was charged twice! Label :", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


def train(model: PeftModel, train_batches: DataLoader, eval_batches: DataLoader, *, epochs: int) -> None:
    """The usual loop: AdamW, linear decay, and each epoch's losses and perplexities."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(train_batches) * epochs)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for batch in tqdm(train_batches, desc=f"epoch {epoch}"):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        train_loss, eval_loss = total / len(train_batches), evaluate(model, eval_batches)
        print(
            f"epoch {epoch}: train loss {train_loss:.4f}, perplexity {torch.tensor(train_loss).exp():.4f}; "
            f"eval loss {eval_loss:.4f}, perplexity {torch.tensor(eval_loss).exp():.4f}"
        )


def evaluate(model: PeftModel, batches: DataLoader) -> float:
    """The mean loss over batches."""
    model.eval()
    with torch.no_grad():
        return sum(model(**batch).loss.item() for batch in batches) / len(batches)


if __name__ == "__main__":
    run(main)
