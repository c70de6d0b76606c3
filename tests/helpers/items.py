"""Item scores as ``evaluate`` yields them."""

import numpy as np
import pandas as pd
from scipy.special import expit

QUESTION = {"correct": [1.0, 1.0, 1.0, 0.0] * 2, "gold_prob": 0.65, "gold_logprob": -1.0}
TEXT = {"loss": 3.0, "kl": 0.0}
DEFAULTS = {
    **dict.fromkeys(("concept", "simdom", "general"), QUESTION),
    **dict.fromkeys(("neutral", "other_sense", "paragraph", "instruction"), TEXT),
    "generation": {"gen_loss": 1.0, "distinct": 0.8},
}


def make_items(changes: dict[str, object] | None = None, sizes: dict[str, int] | None = None) -> pd.DataFrame:
    """Item scores as ``evaluate`` yields them, 8 items a set; ``changes`` maps "set/metric" to value(s), repeated."""
    rows, defaults = (
        [],
        {f"{s}/{metric}": value for s, metrics in DEFAULTS.items() for metric, value in metrics.items()},
    )
    for key, values in (defaults | (changes or {})).items():
        set_, metric = key.split("/")
        n = (sizes or {}).get(set_, 8)
        rows += [(set_, f"{set_}-{i}", metric, float(v)) for i, v in enumerate(np.resize(values, n))]
    return pd.DataFrame(rows, columns=["set", "item", "metric", "value"])


def noisy_items(n: int, seed: int, drop: float = 0.0) -> pd.DataFrame:
    """All metrics random, those of an edited model worse by about ``drop``."""
    random, changes = np.random.default_rng(seed), {}
    for set_, metrics in DEFAULTS.items():
        for metric in metrics:
            draw = random.normal(size=n)
            changes[f"{set_}/{metric}"] = {
                "correct": draw > drop - 0.7, "gold_prob": expit(draw + 0.7 - drop), "gold_logprob": draw - 3 - drop,
                "kl": draw**2 * drop, "distinct": expit(draw + 2 - drop),
            }.get(metric, draw + 4 + drop)  # fmt: skip
    return make_items(changes, dict.fromkeys(DEFAULTS, n))
