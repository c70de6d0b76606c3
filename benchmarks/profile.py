"""``python -m benchmarks.profile``: which operations scoring questions and relearning spend their time on."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.run import questions_of_rome
from ember import load_concept, load_model
from ember.evaluation.evaluate import question_scores
from ember.relearning.attacks import ATTACKS
from ember.relearning.train import RelearnConfig, relearn


def profiled(work: Callable[[], Any]) -> str:
    """The operations of a second call, longest first, as PyTorch's table."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=45))


def main() -> None:
    loaded, texts = load_model("smollm2-135m"), load_concept("Ancient Rome").paragraphs[:6]
    nothing = pd.DataFrame({"set": [], "item": [], "metric": [], "value": []})
    config = RelearnConfig((sum(len(loaded.encode(text)) for text in texts),))
    print(profiled(lambda: question_scores(loaded, questions_of_rome())))
    print(profiled(lambda: relearn(loaded, None, texts, ATTACKS["all"], config, lambda _: nothing, seed=0)))
    print(f"{torch.get_num_threads()} threads; {len(texts)} steps of relearning in float32")


if __name__ == "__main__":
    main()
