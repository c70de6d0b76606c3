"""Profiles and the jobs that follow from them."""

import ast
import json
import os

import pytest
import yaml

from ember.data import list_concepts
from ember.errors import DataError, EmberError, UnknownNameError
from ember.methods import METHODS
from ember.notebooks import check_parameters, read_notebook
from ember.paths import REPOSITORY
from ember.profiles import Profile, frame_path, list_profiles, load_profile, manifest_path, plan, run_name

PROFILES = list_profiles()
GOOD = {
    "model": "tiny",
    "concepts": ["Rome", "Greece"],
    "methods": ["ember", "other"],
    "seeds": [1, 2],
    "deltas": [0.5, 2],
    "fit": {"rank": 8, "sparsity": 0.1},
    "sizes": {"train": {"questions": 4}, "test": {"questions": 8}},
}


@pytest.fixture(autouse=True)
def plain_sizes(monkeypatch):
    monkeypatch.delenv("EMBER_SIZES", raising=False)


@pytest.fixture
def params(tmp_path, monkeypatch):
    """An empty folder of profiles in place of ours."""
    folder = tmp_path / "params"
    folder.mkdir()
    monkeypatch.setattr("ember.profiles.notebooks_dir", lambda: tmp_path)
    return folder


@pytest.fixture
def profile(params) -> Profile:
    write(params, GOOD)
    return load_profile("mine")


def write(params, content, name="mine"):
    (params / f"{name}.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))


# Our profiles


def test_the_default_and_the_test_profile_are_there():
    assert {"laptop", "smoke"} <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_names_what_exists(name):
    profile = load_profile(name)
    assert set(profile.concepts) <= set(list_concepts())
    assert set(profile.methods) <= METHODS.keys()


@pytest.mark.parametrize("name", PROFILES)
def test_profile_settings_are_accepted_where_they_go(name):
    from ember.evaluation import Sizes

    profile = load_profile(name)
    assert {split: Sizes(**size) for split, size in profile.sizes.items()}.keys() == {"train", "test"}
    for method in profile.methods:
        assert all(METHODS[method].config(**profile.fit, delta=delta) for delta in profile.deltas)


@pytest.mark.parametrize("name", PROFILES)
def test_jobs_have_parameters_the_notebooks_take(name):
    for job in plan(load_profile(name)):
        check_parameters(job.notebook, job.parameters)


@pytest.mark.parametrize("name", PROFILES)
def test_jobs_declare_every_frame_their_notebook_writes(name):
    """What is not declared is not made again when it is lost."""
    for job in plan(load_profile(name)):
        code = "\n".join("".join(c["source"]) for c in read_notebook(job.notebook)["cells"] if c["cell_type"] == "code")
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        written = {k.arg for c in calls if getattr(c.func, "id", "") == "write_run" for k in c.keywords}
        assert set(job.frames) == written, job.notebook


def test_smoke_and_laptop_share_one_factorization():
    smoke, laptop = load_profile("smoke"), load_profile("laptop")
    assert smoke.fit == laptop.fit
    assert (smoke.model, smoke.concepts, smoke.seeds) == (laptop.model, laptop.concepts, laptop.seeds)


def test_a_profile_is_read_to_the_letter(profile):
    assert (profile.name, profile.model) == ("mine", "tiny")
    assert (profile.concepts, profile.seeds, profile.deltas) == (("Rome", "Greece"), (1, 2), (0.5, 2.0))
    assert (profile.fit, profile.sizes) == (GOOD["fit"], GOOD["sizes"])


# Broken profiles


@pytest.mark.parametrize("name", ["nope", "", "../params/mine", "mine.yaml"])
def test_unknown_profile_lists_the_known_ones(params, name):
    write(params, GOOD)
    write(params, GOOD, "other")
    with pytest.raises(UnknownNameError, match="known: mine, other"):
        load_profile(name)


def test_unknown_key(params):
    write(params, GOOD | {"delta": [1]})
    with pytest.raises(UnknownNameError, match=r"key in mine\.yaml 'delta'; known: concepts, deltas"):
        load_profile("mine")


@pytest.mark.parametrize("key", GOOD)
def test_missing_key(params, key):
    write(params, {k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(DataError, match=rf"mine\.yaml: missing key '{key}'"):
        load_profile("mine")


@pytest.mark.parametrize(
    ("good", "bad", "key"),
    [
        ("sparsity: 0.1", "sparsity: 1e-4", "fit.sparsity"),  # YAML reads 1e-4 as text
        ("rank: 8", "rank: '8'", "fit.rank"),
        ("rank: 8", "rank: true", "fit.rank"),
        ("- 0.5", "- 5e-1", "deltas"),
        ("seeds:\n- 1", "seeds:\n- 1.5", "seeds"),
        ("- Rome", "- 7", "concepts"),
        ("methods:\n- ember", "methods:\n- null", "methods"),
        ("questions: 4", "questions: 4.5", "sizes.train.questions"),
    ],
)
def test_wrong_type_names_file_and_key(params, good, bad, key):
    text = yaml.safe_dump(GOOD, sort_keys=False)
    assert good in text
    write(params, text.replace(good, bad, 1))
    with pytest.raises(DataError, match=rf"mine\.yaml, key '{key}': .*1\.0e-4"):
        load_profile("mine")


@pytest.mark.parametrize(
    "change",
    [
        {"concepts": "Rome"},  # would be read letter by letter
        {"deltas": 5},
        {"seeds": None},
        {"model": 5},
        {"fit": [1]},
        {"fit": {"rank": 8}},
        {"sizes": {"train": 4}},
    ],
    ids=repr,
)
def test_wrong_shape_is_an_error_that_names_the_file(params, change):
    write(params, GOOD | change)
    with pytest.raises(EmberError, match=r"mine\.yaml"):
        load_profile("mine")


@pytest.mark.parametrize("content", ["", "just text", "model: [", "- a"])
def test_a_file_that_is_no_mapping(params, content):
    write(params, content)
    with pytest.raises(EmberError, match=r"mine\.yaml"):
        load_profile("mine")


# EMBER_SIZES


def test_sizes_come_from_the_other_profile_and_nothing_else(params, monkeypatch):
    other = GOOD | {"model": "big", "seeds": [9], "deltas": [7], "sizes": {"train": {"questions": 1}}, "methods": ["x"]}
    write(params, GOOD)
    write(params, other | {"fit": {"rank": 3, "sparsity": 0.5}}, "other")
    plain = load_profile("mine")
    monkeypatch.setenv("EMBER_SIZES", "other")
    short = load_profile("mine")
    assert (short.deltas, short.sizes) == ((7.0,), {"train": {"questions": 1}})
    assert vars(short) | {"deltas": plain.deltas, "sizes": plain.sizes} == vars(plain)


def test_unknown_sizes_are_an_error(params, monkeypatch):
    write(params, GOOD)
    monkeypatch.setenv("EMBER_SIZES", "nope")
    with pytest.raises(UnknownNameError, match="'nope'; known: mine"):
        load_profile("mine")


# Jobs


def test_every_combination_is_planned_once(profile):
    erased = [job.parameters for job in plan(profile) if job.notebook == "03_erase_concept"]
    wanted = [
        {"concept": c, "seed": s, "method": m} for c in profile.concepts for s in profile.seeds for m in profile.methods
    ]
    assert [{key: p[key] for key in ("concept", "seed", "method")} for p in erased] == wanted


def test_jobs_need_only_earlier_jobs(profile):
    earlier: set[str] = set()
    for job in plan(profile):
        assert set(job.needs) <= earlier
        earlier.add(job.name)


def test_job_names_are_unique(profile):
    names = [job.name for job in plan(profile)]
    assert len(set(names)) == len(names)


def test_an_erasure_needs_the_features_of_its_own_concept_and_seed(profile):
    jobs = {job.name: job for job in plan(profile)}
    for job in jobs.values():
        if job.notebook == "03_erase_concept":
            (needed,) = job.needs
            assert all(jobs[needed].parameters[key] == job.parameters[key] for key in ("concept", "seed", "model"))


def test_the_report_is_last_and_needs_everything(profile):
    *others, report = plan(profile)
    assert report.notebook == "08_report"
    assert set(report.needs) == {job.name for job in others}


# Names of runs


def test_run_name_does_not_depend_on_argument_order():
    given = {"profile": "p", "seed": 1, "concept": "Ancient Rome", "model": "m", "zeta": 3, "alpha": 2}
    name = run_name("03_x", **given)
    assert run_name("03_x", **dict(reversed(given.items()))) == name
    assert name == "03_x__model=m__concept=ancient-rome__seed=1__alpha=2__zeta=3"


@pytest.mark.parametrize("other", [{"seed": 2}, {"rank": 9}, {"concept": "Greece"}, {"ember": True}])
def test_run_name_holds_every_parameter(other):
    given = {"concept": "Rome", "rank": 8, "ember": False, "seed": 1}
    assert run_name("x", **given | other) != run_name("x", **given)


def test_run_name_is_one_file_name():
    name = run_name("x", concept="../../etc", model="owner/name")
    assert os.path.basename(name) == name


def test_paths_are_in_the_results_of_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    assert manifest_path("p", "run") == tmp_path / "p" / "notebooks" / "run.json"
    assert frame_path("p", "run", "loss") == tmp_path / "p" / "records" / "run" / "loss.parquet"
    assert not (tmp_path / "p").exists()


def test_the_snakefile_has_a_rule_for_every_planned_notebook():
    text = (REPOSITORY / "Snakefile").read_text()
    for notebook in {job.notebook for job in plan(load_profile("laptop"))}:
        assert json.dumps(notebook) in text
