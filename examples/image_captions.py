"""Captions of pictures: prefix tuning of LLaVA, or of another model that reads pictures through its processor.

python examples/image_captions.py captions.csv --model llava-hf/llava-1.5-7b-hf
python examples/image_captions.py --tiny
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from through_processor import Row, arguments, fit, word_tokenizer, write
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from twitter_complaints import run

from softtune import PeftModel
from softtune.data import check_columns, load_records

TEXT = "USER: {image} What is this? ASSISTANT:"
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
SIDE, PATCH = 16, 8


def main() -> None:
    args = arguments(
        "Captions of pictures.",
        "CSV file with the columns 'image', a path beside it, and 'caption'",
        "llava-hf/llava-1.5-7b-hf",
        "runs/image_captions",
    )
    rows = [] if args.tiny else captions(args.data)
    base, processor, rows = tiny() if args.tiny else (*pretrained(args.model), rows)
    fit(base, processor, rows, args)
    loaded = PeftModel.from_pretrained(base, args.output)
    print(f"{rows[0].answer!r} is captioned {write(loaded, processor, rows[0])!r}")


def pretrained(name: str) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device), AutoProcessor.from_pretrained(
        name
    )


def captions(file: str) -> list[Row]:
    """The rows of a CSV file."""
    records = load_records(file)
    check_columns(["image", "caption"], records.column_names)
    folder = Path(file).parent
    return [row(Image.open(folder / record["image"]).convert("RGB"), record["caption"]) for record in records]


def row(image: Image.Image, caption: str) -> Row:
    return Row(text=TEXT.format(image="<image>"), answer=caption, media={"images": image})


def tiny() -> tuple[PreTrainedModel, Any, list[Row]]:
    """A LLaVA of random numbers, and squares to name the colours of."""
    words = ["USER:", "What", "is", "this?", "ASSISTANT:", "a", "square", *COLOURS]
    tokenizer = word_tokenizer(words, image_token="<image>")
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer), initializer_range=0.2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **ids,
    )
    torch.manual_seed(0)
    squares = [row(Image.new("RGB", (SIDE, SIDE), colour), f"a {name} square") for name, colour in COLOURS.items()]
    return LlavaForConditionalGeneration(config).eval(), processor, squares * 4


if __name__ == "__main__":
    run(main)
