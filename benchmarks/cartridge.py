"""A cartridge for a text of about 6,000 tokens, with thirty questions whose answers are known.

The text, seven handbooks of a town that does not exist, and the questions stand in ``benchmarks/cartridge``. The same
command goes on after Ctrl-C.

    python benchmarks/cartridge.py --output build/cartridge
    python benchmarks/cartridge.py --output build/cartridge-1 --seed 1

Further arguments are those of ``softtune.distillation.Distillation``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timing import measure, save, show

from softtune.distillation import Distillation, DistillationReport, distill

HERE = Path(__file__).parent / "cartridge"
KEPT = 0.8
"""Share of the full text's right answers that the cartridge must give."""


def main() -> None:
    settings = parsed()
    report = distill(settings, progress=told)
    name = f"cartridge-{settings.seed}"
    measures = measures_of(report)
    show(name, measures)
    results = [{**vars(result)} for result in report.results]
    kept = settings.model_dump(mode="json", exclude={"corpus", "questions", "output", "load"})
    save(name, {"settings": kept, "measures": measures, "results": results})


def parsed() -> Distillation:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    for name, default in (("tokens", 512), ("num_questions", 256), ("steps", 300), ("chunk_tokens", 512), ("seed", 0)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--max-answer-tokens", type=int, default=48)
    parser.add_argument("--model", default="smollm2-135m")
    files = {"corpus": str(HERE / "corpus"), "questions": str(HERE / "questions.jsonl")}
    return Distillation(**files, **vars(parser.parse_args()))


def measures_of(report: DistillationReport) -> list[dict[str, Any]]:
    """Right answers of each method to give the model the text, and what the cartridge saves."""
    by_name = {result.name: result for result in report.results}
    full, own = by_name["full text"], by_name["cartridge"]
    found = [measure(f"right answers: {one.name}", one.accuracy, None) for one in report.results if not one.note]
    if full.note or not full.accuracy:
        return found
    return [
        measure("right answers of the cartridge / of the full text", own.accuracy / full.accuracy, KEPT, at_least=True),
        measure("F1 of the cartridge / of the full text", own.f1 / full.f1, None),
        measure("bytes of keys and values: full text / cartridge", full.kv_bytes / own.kv_bytes, None),
        measure("seconds of a request: full text, read anew / cartridge", full.seconds / own.seconds, None),
        measure(
            "seconds of a request: full text in a cache / cartridge", (full.seconds - full.reading) / own.seconds, None
        ),
        *found,
    ]


def told(phase: Any, done: int, total: int, notes: str) -> None:
    print(f"{phase}: {done} of {total} {notes}", flush=True)


if __name__ == "__main__":
    main()
