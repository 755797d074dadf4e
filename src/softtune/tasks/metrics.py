"""Metrics of predictions against references, by the usual libraries: scikit-learn, seqeval, sacreBLEU and rouge-score.
SQuAD's two metrics have no library and are implemented here.

Every metric is a function of row indices, so that it gets a confidence interval from resampled rows (the bootstrap).
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softtune.extras import require

RESAMPLES = 1000
LOSS = "loss"
"""The mean loss over labels, which every task has on rows that are held out of training."""
PERPLEXITY = "perplexity"
LABEL_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
TAG_METRICS = ("f1", "precision", "recall", "accuracy")
SPAN_METRICS = ("exact_match", "f1")
TEXT_METRICS = ("bleu", "rouge_l", "chrf", "exact_match", PERPLEXITY)


@dataclass(frozen=True)
class Metric:
    """How a metric is read."""

    higher_is_better: bool = True
    format: str = ".1%"
    """Of its value in tables."""


METRICS = {
    **dict.fromkeys([*LABEL_METRICS, *TAG_METRICS, *SPAN_METRICS, *TEXT_METRICS], Metric()),
    PERPLEXITY: Metric(higher_is_better=False, format=".2f"),
    LOSS: Metric(higher_is_better=False, format=".3f"),
}
"""All metrics by name."""

Rows = NDArray[np.intp]
Statistic = Callable[[Rows], float]
"""A metric of some of the rows, given their indices."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Metrics of predictions."""

    metrics: dict[str, float]
    """From 0 to 1, higher is better; BLEU and chrF too. Only perplexity is 1 or more, and lower is better."""
    mistakes: list[int]
    """Indices of the rows whose prediction does not match a reference exactly."""
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    """``precision``, ``recall``, ``f1`` and ``rows`` of each label or entity type; empty for texts and spans."""
    statistics: dict[str, Statistic] = field(default_factory=dict, repr=False, compare=False)
    """The metrics as functions of row indices."""
    rows: int

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap confidence interval of each metric, from 1000 resamples of the rows (Efron, 1979)."""
        generator = np.random.default_rng(0)
        samples = generator.integers(0, self.rows, (RESAMPLES, self.rows))
        return {name: _middle([metric(rows) for rows in samples]) for name, metric in self.statistics.items()}


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is."""
    return 1 if METRICS.get(metric, Metric()).higher_is_better else -1


def label_quality(references: Sequence[str], answers: Sequence[str]) -> Quality:
    """``accuracy``, ``balanced_accuracy`` (the mean recall over labels) and ``macro_f1``.

    Raises:
        MissingExtraError: the extra ``metrics`` is not installed.
    """
    require("metrics")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = sorted({*references, *answers})
    numbers = {label: i for i, label in enumerate(labels)}
    truth, found = (np.array([numbers[label] for label in side]) for side in (references, answers))

    def matrix(rows: Rows) -> NDArray[np.float64]:
        return np.asarray(confusion_matrix(truth[rows], found[rows], labels=range(len(labels))), dtype=np.float64)

    scores = precision_recall_fscore_support(truth, found, labels=range(len(labels)), zero_division=0.0)
    of_labels = zip(labels, *(column.tolist() for column in scores), strict=True)
    return _quality(
        {
            "accuracy": lambda rows: float((truth[rows] == found[rows]).mean()),
            "balanced_accuracy": lambda rows: _balanced(matrix(rows)),
            "macro_f1": lambda rows: _macro_f1(matrix(rows)),
        },
        mistakes=truth != found,
        classes={
            label: {"precision": precision, "recall": recall, "f1": f1, "rows": rows}
            for label, precision, recall, f1, rows in of_labels
        },
    )


def tag_quality(references: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> Quality:
    """``precision``, ``recall`` and ``f1`` of whole entities in BIO tags, and ``accuracy`` of tags.

    Raises:
        MissingExtraError: the extra ``metrics`` is not installed.
    """
    require("metrics")
    from seqeval.metrics import classification_report
    from seqeval.metrics.sequence_labeling import get_entities

    entities = [[set(get_entities(list(tags))) for tags in side] for side in (references, answers)]
    hits = np.array([len(a & b) for a, b in zip(*entities, strict=True)], dtype=float)
    wanted, found = (np.array([len(spans) for spans in side], dtype=float) for side in entities)
    same = np.array([sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(references, answers, strict=True)])
    words = np.array([len(tags) for tags in references])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Precision and F-score are ill-defined")
        warnings.filterwarnings("ignore", message="Recall and F-score are ill-defined")
        report: dict[str, Any] = {}
        if wanted.any() or found.any():
            sides = ([list(tags) for tags in side] for side in (references, answers))
            report = classification_report(*sides, output_dict=True, zero_division=0)
    return _quality(
        {
            "f1": lambda rows: _share(2 * hits[rows].sum(), wanted[rows].sum() + found[rows].sum()),
            "precision": lambda rows: _share(hits[rows].sum(), found[rows].sum()),
            "recall": lambda rows: _share(hits[rows].sum(), wanted[rows].sum()),
            "accuracy": lambda rows: _share(same[rows].sum(), words[rows].sum()),
        },
        mistakes=same < words,
        classes={
            kind: {
                "precision": float(scores["precision"]),
                "recall": float(scores["recall"]),
                "f1": float(scores["f1-score"]),
                "rows": float(scores["support"]),
            }
            for kind, scores in report.items()
            if not kind.endswith(" avg")
        },
    )


def span_quality(references: Sequence[Sequence[str]], answers: Sequence[str]) -> Quality:
    """``exact_match`` and ``f1`` of words against the best-matching reference of each question (Rajpurkar et al. 2016).
    The reference of a question without an answer is ""."""
    pairs = [
        ([_squad_words(one) for one in several or [""]], _squad_words(answer))
        for several, answer in zip(references, answers, strict=True)
    ]
    exact = np.array([max(float(one == found) for one in some) for some, found in pairs])
    f1 = np.array([max(_word_f1(one, found) for one in some) for some, found in pairs])
    return _quality(
        {"exact_match": lambda rows: float(exact[rows].mean()), "f1": lambda rows: float(f1[rows].mean())},
        mistakes=exact < 1,
    )


def contains(reference: str, answer: str) -> bool:
    """Whether an answer has the words of a reference, one after the other, as SQuAD compares them.

    A reference that has none by then, such as "A" or "%", is looked for as it is written.
    """
    words, found = _squad_words(reference), _squad_words(answer)
    if not words:
        return _is_written_in(reference.strip(), answer)
    return any(found[start : start + len(words)] == words for start in range(len(found) - len(words) + 1))


def _is_written_in(text: str, answer: str) -> bool:
    """Whether an answer has a text in it, which does not begin or end within a word; an empty one only if it is empty
    itself."""
    if not text:
        return not answer.strip()
    begin, end = (r"\b" if char.isalnum() else "" for char in (text[0], text[-1]))
    return re.search(begin + re.escape(text) + end, answer) is not None


def _squad_words(text: str) -> list[str]:
    """The words of a text as SQuAD compares them: in lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _word_f1(references: Sequence[str], found: Sequence[str]) -> float:
    """F1 of two bags of words, the harmonic mean of precision and recall; 1.0 where both are empty."""
    if not references or not found:
        return float(references == found)
    return 2 * (Counter(references) & Counter(found)).total() / (len(references) + len(found))


def text_quality(
    references: Sequence[Sequence[str]], answers: Sequence[str], likelihoods: Tensor | None = None
) -> Quality:
    """``bleu`` and ``chrf`` of sacreBLEU, ``rouge_l`` (F-measure with stemming, best-matching reference) and
    ``exact_match``, against all references of each text.

    Args:
        references: the references of each text.
        answers: the generated texts.
        likelihoods: [B, 2] log-probability and number of tokens of each text's first reference; if given, the result
            has ``perplexity``, in which every token has the same weight.

    Raises:
        MissingExtraError: the extra ``metrics`` is not installed.
    """
    require("metrics")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(references, answers, strict=True))
    rouge = np.array([scorer.score_multi(list(several), answer)["rougeL"].fmeasure for several, answer in pairs])
    exact = np.array([any(answer.strip() == one.strip() for one in several) for several, answer in pairs], dtype=float)
    statistics: dict[str, Statistic] = {
        "bleu": _of_corpus(BLEU(), references, answers),
        "rouge_l": lambda rows: float(rouge[rows].mean()),
        "chrf": _of_corpus(CHRF(), references, answers),
        "exact_match": lambda rows: float(exact[rows].mean()),
    }
    if likelihoods is not None:
        sums, counts = likelihoods.double().numpy().T
        statistics[PERPLEXITY] = lambda rows: float(np.exp(-sums[rows].sum() / counts[rows].sum()))
    return _quality(statistics, mistakes=exact < 1)


def _of_corpus(metric: Any, references: Sequence[Sequence[str]], answers: Sequence[str]) -> Statistic:
    """A sacreBLEU metric as a function of rows: it sums the statistics of the rows."""
    most = max(len(several) for several in references)
    streams = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    counts = np.array(metric._extract_corpus_statistics(list(answers), streams))
    return lambda rows: float(metric._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score) / 100


def _quality(
    statistics: dict[str, Statistic], *, mistakes: NDArray[np.bool_], classes: dict[str, dict[str, float]] | None = None
) -> Quality:
    every = np.arange(len(mistakes))
    return Quality(
        metrics={name: statistic(every) for name, statistic in statistics.items()},
        mistakes=np.flatnonzero(mistakes).tolist(),
        classes=classes or {},
        statistics=statistics,
        rows=len(mistakes),
    )


def _balanced(matrix: NDArray[np.float64]) -> float:
    """The mean recall over the labels that occur in the references."""
    rows = matrix.sum(axis=1)
    return float((matrix.diagonal()[rows > 0] / rows[rows > 0]).mean())


def _macro_f1(matrix: NDArray[np.float64]) -> float:
    """The mean F1 over the labels that occur in the references or the predictions."""
    either = matrix.sum(axis=0) + matrix.sum(axis=1)
    return float((2 * matrix.diagonal()[either > 0] / either[either > 0]).mean())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _middle(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
