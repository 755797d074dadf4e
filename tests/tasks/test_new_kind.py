"""A new kind of task is one class, and one line in ``KINDS``: it trains, is evaluated and is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from softtune.cli.loading import load_trained
from softtune.evaluation.answers import answer, judge
from softtune.tasks import KINDS, LabelTask, Prediction
from softtune.tasks.metrics import label_quality
from softtune.training.recipe import Recipe
from softtune.training.run import train
from tests.serving.test_http import serving
from tests.tiny import save_models


class RatingTask(LabelTask):
    """Labels that are numbers, answered with the nearest to their expected value."""

    endpoint, endpoint_summary, asks_for = "/v1/rate", "Rate records.", "ratings"
    metrics = ("accuracy",)

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        return all(str(label).isdecimal() for label in recipe.labels or ("none",))

    def process(self, *args: Any) -> Prediction:
        scores = super().process(*args).scores
        mean = sum(int(label) * p for label, p in zip(self.label_set, scores.softmax(-1).tolist(), strict=True))
        return Prediction(answer=min(self.label_set, key=lambda label: abs(int(label) - mean)), truncated=0)


ROWS = [{"x": "red sky", "y": "3"}, {"x": "blue sky", "y": "1"}] * 6


def test_a_new_kind_trains_is_evaluated_and_is_served(tmp_path: Path) -> None:
    KINDS.insert(0, RatingTask)
    try:
        model = save_models(tmp_path / "models", attention_dropout=0.0)["llama"]
        Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
        recipe = Recipe.from_fields(
            {
                "model": model,
                "train": str(tmp_path / "rows.jsonl"),
                "test_size": 4,
                "template": "{x} label : ",
                "label_column": "y",
                "labels": {"1": "bad", "3": "good"},
                "options": {"num_virtual_tokens": 3},
                "learning_rate": 0.1,
                "epochs": 6,
                "output": str(tmp_path / "runs" / "rated"),
            }
        )
        report = train(recipe)
        assert report.after["accuracy"] == 1.0
        trained = load_trained(tmp_path / "runs" / "rated", None)
        assert isinstance(trained.task, RatingTask)
        rows = Dataset.from_list(ROWS)
        answers = answer(trained.model, trained.tokenizer, trained.task, rows)
        assert judge(trained.task, rows, answers).metrics == label_quality(rows["y"], answers.texts).metrics
        with serving(model, tmp_path / "runs") as client:
            asked = {"model": "rated", "input": [row["x"] for row in ROWS[:2]]}
            served = client.post("/v1/rate", json=asked).json()
            assert [one["answer"] for one in served["data"]] == answers.texts[:2]
            assert "ask it for ratings" in client.post("/v1/classify", json=asked).text
            assert client.get("/v1/models/rated").json()["endpoint"] == "/v1/rate"
    finally:
        KINDS.remove(RatingTask)
