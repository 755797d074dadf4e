"""How much an adapter's answers change where its base model is loaded otherwise than it was in training.

SmolLM2-135M and the prefix of recipes/sst2.yaml, trained on 128 reviews with the base model in one precision, and asked
about 100 others with it in each. Run alone: ``make bench-drift``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

from timing import save
from torch import Tensor

from softtune.evaluation import answer, judge
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.tasks.metrics import Quality
from softtune.training import Recipe, train
from softtune.training.rows import training_and_evaluation_rows

ROOT = Path(__file__).parents[1]
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bnb-8bit": {"dtype": "float32", "quantization": "bnb-8bit"},
    "bnb-4bit": {"dtype": "float32", "quantization": "bnb-4bit"},
    "torchao-int8": {"dtype": "float32", "quantization": "torchao-int8"},
}
TRAINED_IN = ("float32", "bfloat16", "bnb-4bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst2", default="data/sst2", help="folder with stsa.binary.train and stsa.binary.dev")
    sst2 = Path(parser.parse_args().sst2)
    warnings.simplefilter("ignore")  # each says that the precision is another
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in TRAINED_IN:
            recipe = recipe_in(precision, sst2, Path(folder, precision))
            train(recipe)
            found = {name: answers_in(recipe, name) for name in PRECISIONS}
            own, _ = found[precision]
            for name, (scores, quality) in found.items():
                drift = float((scores - own).abs().mean())
                row = {
                    "trained in": precision,
                    "used in": name,
                    "drift": drift,
                    "accuracy": quality.metrics["accuracy"],
                }
                print(row, flush=True)
                rows.append(row)
    save("drift", {"rows": rows})


def recipe_in(precision: str, sst2: Path, output: Path) -> Recipe:
    data = {"train": str(sst2 / "stsa.binary.train"), "evaluation": str(sst2 / "stsa.binary.dev")}
    sizes = {"examples": 128, "evaluation_examples": 100}
    changes = {**data, **sizes, **PRECISIONS[precision], "output": str(output)}
    return Recipe.load(ROOT / "recipes" / "sst2.yaml", changes)


def answers_in(recipe: Recipe, precision: str) -> tuple[Tensor, Quality]:
    """The log-probabilities [B, labels] and the metrics of an adapter's answers, with its base model in a precision."""
    options = recipe.inference_load_options(quantization=None).model_copy(update=PRECISIONS[precision])
    base, tokenizer = load_base_model(recipe.model, options=options)
    model = PeftModel.from_pretrained(base, recipe.output)
    _, records = training_and_evaluation_rows(recipe, recipe.definition)
    assert records is not None
    answers = answer(model, tokenizer, recipe.definition, records)
    assert answers.scores is not None
    return answers.scores, judge(recipe.definition, records, answers)


if __name__ == "__main__":
    main()
