"""generated_predictions.txt and predict_results.json as ChatGLM-6B's evaluate.sh leaves them, for
scripts that read those.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from evaluation.metrics import METRICS

PREDICTIONS, RESULTS = "generated_predictions.txt", "predict_results.json"


def prediction_lines(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One JSON line per (reference, prediction), in the order of the dataset."""
    for reference, prediction in pairs:
        yield (
            json.dumps(
                {"labels": reference.strip(), "predict": prediction.strip()}, ensure_ascii=False
            )
            + "\n"
        )


def results(scores: dict[str, dict[str, float]], samples: int, seconds: float) -> str:
    """Upstream's keys. Its steps are batches of one row, so both speeds are the same number."""
    speed = round(samples / seconds, 3) if seconds else 0.0
    content: dict[str, Any] = {
        **{f"predict_{metric}": scores[metric]["value"] for metric in sorted(METRICS)},
        "predict_runtime": round(seconds, 4),
        "predict_samples": samples,
        "predict_samples_per_second": speed,
        "predict_steps_per_second": speed,
    }
    return json.dumps(content, indent=4) + "\n"
