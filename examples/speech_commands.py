"""Spoken commands: prefix tuning of Qwen2-Audio, whose encoder of sounds is Whisper's.

The data are folders of WAV files, named by the word that is spoken, as in Google's Speech Commands: 16 bits, 16 kHz.

python examples/speech_commands.py speech_commands/ --model Qwen/Qwen2-Audio-7B
python examples/speech_commands.py --tiny
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from through_processor import Row, arguments, fit, word_tokenizer, write
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from twitter_complaints import run

from softtune import DataError, PeftModel

TEXT = "<|audio_bos|> <|AUDIO|> <|audio_eos|> The word is"
RATE = 16_000
TONES = {"low": 200.0, "high": 1600.0}
MELS, SECONDS = 16, 1


def main() -> None:
    args = arguments(
        "Spoken commands.", "folder of folders of WAV files", "Qwen/Qwen2-Audio-7B", "runs/speech_commands"
    )
    rows = [] if args.tiny else commands(Path(args.data))
    base, processor, rows = tiny() if args.tiny else (*pretrained(args.model), rows)
    fit(base, processor, rows, args)
    loaded = PeftModel.from_pretrained(base, args.output)
    print(f"{rows[0].answer!r} is heard as {write(loaded, processor, rows[0])!r}")


def pretrained(name: str) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2AudioForConditionalGeneration.from_pretrained(name, dtype="auto")
    return model.to(device), AutoProcessor.from_pretrained(name)


def commands(folder: Path) -> list[Row]:
    """The rows of a folder.

    Raises:
        DataError: there is no WAV file in it, or one of another kind.
    """
    rows = [row(samples(file), file.parent.name) for file in sorted(folder.glob("*/*.wav"))]
    if not rows:
        raise DataError(f"{folder} has no WAV files in folders", "name a folder for each word")
    return rows


def samples(file: Path) -> np.ndarray:
    """The samples of a WAV file, from -1 to 1.

    Raises:
        DataError: it is no mono file of 16 bits and 16 kHz.
    """
    with wave.open(str(file)) as opened:
        if (opened.getnchannels(), opened.getsampwidth(), opened.getframerate()) != (1, 2, RATE):
            raise DataError(f"{file} is no mono file of 16 bits and {RATE} Hz", "convert it")
        frames = opened.readframes(opened.getnframes())
    return np.frombuffer(frames, dtype="<i2").astype(np.float32) / 2**15


def row(sound: np.ndarray, word: str) -> Row:
    return Row(text=TEXT, answer=word, media={"audio": sound}, options={"sampling_rate": RATE})


def tiny() -> tuple[PreTrainedModel, Any, list[Row]]:
    """A Qwen2-Audio of random numbers, and tones to name the pitch of."""
    special = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = word_tokenizer(["The", "word", "is", *TONES], **special)
    extractor = WhisperFeatureExtractor(feature_size=MELS, sampling_rate=RATE, chunk_length=SECONDS)
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    sound = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            **sound, num_mel_bins=MELS, max_source_positions=extractor.nb_max_frames // 2
        ),
        text_config=Qwen2Config(**text, **ids, vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        **ids,
    )
    torch.manual_seed(0)
    times = np.arange(RATE * SECONDS, dtype=np.float32) / RATE
    tones = [row(np.sin(2 * np.pi * pitch * times), name) for name, pitch in TONES.items()]
    return Qwen2AudioForConditionalGeneration(config).eval(), processor, tones * 4


if __name__ == "__main__":
    run(main)
