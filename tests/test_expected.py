"""Expected hours: the formula against the same by hand, what is measured before it, and what a cluster is asked for."""

import math

import pandas as pd
import pytest

from ember import expected
from ember.errors import UnknownNameError
from ember.expected import GPUS, Work, expected_seconds, expected_table, formula_seconds, request, work
from ember.planning import plan
from ember.profiles import load_profile
from ember.specs import find_spec

PAPER = ("paper-gemma", "paper-llama")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Results in a folder of the test's own, and nothing remembered from others."""
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    for remembered in (expected._measured, expected._alike):
        remembered.cache_clear()
    yield
    for remembered in (expected._measured, expected._alike):
        remembered.cache_clear()


def job_of(profile, notebook: str, **parameters):
    return next(
        job for job in plan(profile) if job.notebook == notebook and parameters.items() <= job.parameters.items()
    )


def test_a_relearning_by_hand():
    profile = load_profile("paper-llama")
    job = job_of(profile, "04_relearn", method="ember")
    tokens, questions, weights = 51200, 50, find_spec(profile.model).shape.parameters
    steps = tokens / 128
    scored = 4 * questions * 80
    assert work(profile, job) == Work(trained=tokens, scored_fp32=scored, moved_bytes=steps * weights * 16)
    met = weights - 128256 * 4096
    compute = 6 * met * tokens / (0.25 * 312e12) + 2 * met * scored / (0.25 * 19.5e12)
    moved = steps * weights * 16 / (0.5 * 2e12)
    start = 60 + 2 * weights * (1 / 1e9 + 3 / 0.5e9)
    assert formula_seconds(profile, job, GPUS["a100"]) == pytest.approx(compute + moved + start)


def test_an_erasure_grows_with_its_grid_and_with_what_it_trains():
    profile = load_profile("paper-gemma")
    by_method = {m: work(profile, job_of(profile, "03_erase_concept", method=m)) for m in profile.methods}
    cells = {m: len(profile.cells(m)) for m in profile.methods}
    assert cells == {"ember": 8, "snmf": 75, "rmu": 144, "crisp": 36, "pisces": 25}
    assert by_method["rmu"].trained == 144 * 2 * 150 * 16 * expected.SENTENCE
    assert by_method["crisp"].trained == 36 * 2 * 150 * 4 * expected.SENTENCE
    assert by_method["ember"].trained == by_method["snmf"].trained == 0
    train = expected.evaluation_work(profile.sizes["train"], "train").scored
    once = train + expected.FIT_SENTENCES * expected.SENTENCE
    assert by_method["snmf"].scored - by_method["ember"].scored == pytest.approx((75 - 8) * once)


def test_only_what_a_judge_is_asked_waits_for_it():
    sizes = dict(load_profile("paper-gemma").sizes["test"])
    assert expected.evaluation_work(sizes, "test").replies == 150 + 2 * 50
    assert expected.evaluation_work(sizes | {"judge": False, "open_answers": 0}, "test").replies == 0


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_profiles_are_known_throughout(name):
    profile = load_profile(name)
    table = expected_table(profile)
    assert table.runs.sum() == len(plan(profile))
    assert set(table.source) == {"formula"}
    assert (table.hours > 0).all()
    assert expected_table(profile, "h100").hours.sum() < table.hours.sum()


def test_the_larger_model_takes_longer():
    hours = [expected_table(load_profile(name)).hours.sum() / len(plan(load_profile(name))) for name in PAPER]
    assert hours[0] < hours[1]


def test_measured_times_come_first(tmp_path):
    profile = load_profile("paper-gemma")
    job, other = plan(profile)[:2]
    path = tmp_path / profile.name / "tables" / "run_times.csv"
    path.parent.mkdir(parents=True)
    row = {"run": job.name, "notebook": job.notebook, "start": 0.0, "wall_seconds": 1234.0, "peak_memory_mb": 5}
    pd.DataFrame([row]).to_csv(path, index=False)
    assert expected_seconds(profile, job) == (1234.0, "measured")
    assert expected_seconds(profile, other)[1] == "formula"


def test_a_profile_without_times_takes_those_of_the_same_model():
    profile = load_profile("smoke")
    seconds, source = expected_seconds(profile, job_of(profile, "03_erase_concept", method="rmu", ember=False))
    assert source == "like" and 30 < seconds < 3600
    strange = load_profile("smoke").__class__(**{**vars(profile), "model": "somebody/model"})
    seconds, source = expected_seconds(strange, plan(strange)[0])
    assert math.isnan(seconds) and source == "unknown"
    asked = request(strange, plan(strange)[0])
    assert (asked.gpu, asked.runtime) == (1, expected.UNKNOWN_MINUTES)


def test_an_unknown_gpu_lists_the_known_ones():
    profile = load_profile("smoke")
    with pytest.raises(UnknownNameError, match="'abacus'; known: a100, h100"):
        expected_seconds(profile, plan(profile)[0], "abacus")


@pytest.mark.parametrize("name", ["smoke", "laptop", *PAPER])
def test_what_a_cluster_is_asked_for(name):
    """The embedded model runs without a GPU, all others with one; a later attempt gets more."""
    profile = load_profile(name)
    for job in plan(profile):
        first, second = (request(profile, job, attempt=attempt) for attempt in (1, 2))
        assert first.gpu == second.gpu == int(name in PAPER and job.notebook != "08_report")
        assert second.runtime == 2 * first.runtime and second.mem_mb >= 2 * first.mem_mb - 1
        seconds, _ = expected_seconds(profile, job)
        assert math.isnan(seconds) or first.runtime * 60 >= 3 * seconds - 60
