"""Profiles: ours, how they are read, what is refused, and the jobs that follow from them."""

import ast
import os
import re
import socket
from functools import reduce
from itertools import product
from operator import getitem

import pytest
import yaml

from ember.batch import planning
from ember.batch.notebooks import check_parameters, read_notebook
from ember.batch.planning import ERASE, RELEARN, SELECT, Job, arms, frame_path, manifest_path, plan, run_name
from ember.batch.profiles import Profile, list_profiles, load_profile
from ember.data.ours import list_concepts
from ember.errors import DataError, EmberError, UnknownNameError
from ember.methods import METHODS
from ember.models.specs import MODELS
from ember.relearning.train import RelearnConfig

PROFILES = list_profiles()
PAPERS = [name for name in PROFILES if name.startswith("paper-")]
RELEASED = (
    "Ancient Rome", "Artificial intelligence", "Baseball", "Cannabis", "COVID-19 pandemic", "Culture of Greece",
    "Gambling", "Golf", "Gun", "Halloween", "Harry Potter", "Heroin", "Nazism", "Pornography", "Republic of Ireland",
    "Uranium", "Valentine's Day", "World War II",
)  # fmt: skip
SWEEP = {"arms": ["none", "ember+other"], "attacks": ["all", "lora"], "precisions": ["fp32"], "lrs": [0.1]}
GOOD = {
    "model": "tiny", "source": "released", "concepts": ["Rome", "Greece"], "seeds": [1, 2],
    "methods": ["ember", "other"], "controls": ["aside"], "fit": {"rank": 8, "sparsity": 0.1},
    "grids": {"ember": {"delta": [0.5, 2]}, "other": {"lr": [0.1, 0.2], "layer": 3}, "aside": {"delta": 1.0}},
    "sizes": {"train": {"questions": 4}, "test": {"questions": 8}},
    "relearn": {"settings": {"points": [10, 20]}, "sweeps": [SWEEP]},
    "localize": {"arms": ["ember", "ember+other"], "texts": 3},
    "trade": {"edits": ["EMBER"], "strengths": [1.0], "questions": 3, "texts": 3, "seeds": 1},
    "stability": {"ranks": [8], "sparsities": [0.1], "seeds": [3], "precisions": ["float32"], "questions": 3},
    "teach": {"arms": ["other"], "tokens": 9, "lr": 0.1, "batch_size": 2, "questions": 3, "texts": 3, "seeds": 1},
    "judge": {"base_url": "http://localhost:1/v1", "model": "m", "key_variable": "SOME_KEY", "max_calls": 9},
}  # fmt: skip


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write profiles into a folder of their own and read the first: GOOD with changes, or the text of a file."""
    monkeypatch.setenv("EMBER_PROFILES", str(tmp_path))

    def written(content=None, file="mine", **changes) -> Profile:
        text = yaml.safe_dump(GOOD | changes, sort_keys=False) if content is None else content
        (tmp_path / f"{file}.yaml").write_text(text)
        return load_profile("mine")

    return written


def changed(key: str, *value) -> str:
    """The text of GOOD with this value at a dotted key, or without the key."""
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    *way, last = (int(step) if step.isdigit() else step for step in re.findall(r"\w+", key))
    at = reduce(getitem, way, content)
    if value:
        at[last] = value[0]
    else:
        del at[last]
    return yaml.safe_dump(content, sort_keys=False)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_names_what_exists_and_its_settings_are_accepted_where_they_go(name):
    profile = load_profile(name)
    assert set(profile.concepts) <= set(list_concepts() if profile.source == "ours" else RELEASED)
    assert {*profile.methods, *profile.controls} <= profile.grids.keys() <= METHODS.keys()
    assert profile.model in MODELS
    assert profile.sizes.keys() == {"train", "test"}
    for method in profile.grids:
        cells = profile.cells(method)
        assert cells and all(METHODS[method].config(**settings) for settings in cells.values())
    for job in plan(profile):
        check_parameters(job.notebook, job.parameters)
    # The tests' profile can stand in for the default, as in `make nbval`; the paper's models have one each.
    smoke, laptop = load_profile("smoke"), load_profile("laptop")
    assert all(getattr(smoke, key) == getattr(laptop, key) for key in ("fit", "model", "concepts", "seeds"))
    assert {load_profile(name).model for name in PAPERS} == {"gemma-2-2b-it", "llama-3.1-8b-instruct"}


@pytest.mark.parametrize("notebook", planning.FRAMES)
def test_every_frame_that_a_notebook_writes_is_declared(notebook):
    """What is not declared is not made again when it is lost."""
    code = "\n".join("".join(c["source"]) for c in read_notebook(notebook)["cells"] if c["cell_type"] == "code")
    nodes = list(ast.walk(ast.parse(code)))
    (save,) = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.save")
    written = {keyword.arg for keyword in save.keywords if keyword.arg} - {"labels"}
    for name in (ast.unparse(keyword.value) for keyword in save.keywords if not keyword.arg):  # **tables
        assigned = [node for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
        written |= {key.value for node in assigned for key in getattr(node.value, "keys", [])}
    assert written == set(planning.FRAMES[notebook])


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_profile_is_the_paper_s_experiment_and_is_planned_without_a_network(name, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    profile = load_profile(name)
    jobs = plan(profile)
    assert {job.parameters["concept_name"] for job in jobs[:-1]} == set(RELEASED)
    assert profile.needs.startswith(f"estimated, not measured: {len(jobs)} runs")
    assert (profile.source, profile.concepts) == ("released", RELEASED)
    assert profile.fit["rank"] == {"paper-gemma": 100, "paper-llama": 200}[name]
    assert [cell["delta"] for cell in profile.cells("ember").values()] == [0.5, 1, 2, 5, 10, 50, 100, 200]
    others = [(m, e) for m in ("snmf", "rmu", "crisp", "pisces") for e in (False, True)]
    assert arms(profile.model_copy(update={"controls": ()})) == [("ember", False), *others]
    first = profile.relearn.sweeps[0]
    assert (first.attacks, first.precisions, first.lrs) == (("all",), ("bf16",), (1e-5,))
    assert set(first.arms) >= {"none", *(f"{e}{m}" for m in profile.methods[1:] for e in ("", "ember+"))}
    assert RelearnConfig(**profile.relearn.settings).points[-1] == 2 * 100 * 256
    assert {split: size.questions for split, size in profile.sizes.items()} == {"train": 50, "test": 1000}
    # Layers exist, and released autoencoders are of this model.
    depth = {"paper-gemma": 26, "paper-llama": 32}[name]
    for method in ("crisp", "pisces"):
        cells = list(profile.cells(method).values())
        assert {cell["sae"] for cell in cells} == {name.replace("paper-", "") + "-scope"}
        assert max(layer for cell in cells for layer in cell["layers"]) < depth


def test_a_profile_is_read_to_the_letter(load):
    """And a grid takes settings of any kind, and may be of a method without arms."""
    profile = load()
    assert profile.name == "mine" and (profile.dtype, profile.needs) == (None, "")
    assert profile.localize.seeds is None and profile.relearn.sweeps[0].budgets == (1,)
    assert profile.model_dump(mode="json", exclude_unset=True) == GOOD
    assert load(dtype="bfloat16", needs="much").dtype == "bfloat16"
    for value in ("early", [1, 2], [[3], [4]], True, None):
        assert load(methods=["ember"], grids=GOOD["grids"] | {"other": {"x": value}}).grids["other"] == {"x": value}


def cells(load, method="other", **grid) -> dict:
    """Cells of a grid, as read from a file."""
    return load(grids=dict.fromkeys(("ember", "other", "aside"), grid)).cells(method)


def test_cells_are_all_combinations_in_the_order_of_the_file(load):
    """The first setting varies slowest. Fixed ones are in every cell and no label; so is a search of one value."""
    for grid, wanted in (
        ({}, {"only cell": {}}), *(({"layer": layer}, {"only cell": {"layer": 3}}) for layer in (3, [3])),
        ({"delta": [2, 0.5, 10.0]}, {f"delta={d:g}": {"delta": d} for d in (2, 0.5, 10)}),
        ({"layer": [1, 7], "lr": [0.001, 0.5]},
         {f"layer={k} lr={lr}": {"layer": k, "lr": lr} for k in (1, 7) for lr in (0.001, 0.5)}),
        ({"lr": [0.1, 0.2], "band": "early", "k": [5]},
         {f"lr={lr}": {"lr": lr, "band": "early", "k": 5} for lr in (0.1, 0.2)}),
        ({"layers": [[3], [3, 4]], "mu": 2.0},
         {f"layers={layers}": {"layers": layers, "mu": 2.0} for layers in ([3], [3, 4])}),
    ):  # fmt: skip
        assert list(cells(load, **grid).items()) == list(wanted.items())


def test_cells_have_the_fit_s_settings_do_not_follow_each_other_and_no_two_have_one_label(load):
    """The fit is EMBER's and its controls'. A grid may search what the fit sets."""
    for method in ("ember", "aside"):
        assert list(cells(load, method, delta=[1.0, 2.0]).values()) == [GOOD["fit"] | {"delta": d} for d in (1.0, 2.0)]
    assert cells(load, "ember", rank=[4, 6]) == {f"rank={k}": {"rank": k, "sparsity": 0.1} for k in (4, 6)}
    profile = load(grids=GOOD["grids"] | {"ember": {"delta": [1.0, 2.0], "layer": 3}})
    profile.cells("ember")["delta=1"]["layer"] = 9
    assert [cell["layer"] for cell in profile.cells("ember").values()] == [3, 3]
    with pytest.raises(DataError, match=r"profile mine: two cells of other are both 'lr=0\.1'"):
        cells(load, lr=[0.1, 0.1000000001])


def test_an_unknown_key_lists_the_known_ones_and_a_missing_one_is_named(load):
    for key, message in {
        "delta": r"key in mine\.yaml 'delta'; known: concepts, controls, dtype, fit, grids",
        "name": r"key in mine\.yaml 'name'; known: concepts",
        "fit.ranks": r"key in fit of mine\.yaml 'ranks'; known: max_iter, .*rank, ",
        "localize.more": r"key in localize of mine\.yaml 'more'; known: arms, seeds",
        "relearn.more": r"relearn of mine\.yaml 'more'; known: settings",
        "relearn.sweeps[0].lr": r"sweeps\[0\] of mine\.yaml 'lr'; .*lrs",
        "judge.url": r"judge of mine\.yaml 'url'; known: .*base_url",
    }.items():
        with pytest.raises(UnknownNameError, match=message):
            load(changed(key, 1))
    for key in (
        *GOOD, *(f"{part}.{key}" for part in ("fit", "grids") for key in GOOD[part]), "relearn.sweeps",
        "relearn.sweeps[0].lrs", "localize.texts", "teach.tokens",
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"mine\.yaml: missing key '{re.escape(key)}'"):
            load(changed(key))


@pytest.mark.parametrize(("key", "value"), [
    ("fit", [1]), ("fit.sparsity", "1e-4"), ("fit.rank", "8"), ("fit.rank", True), ("fit.precision", 64),
    ("grids", 5), ("grids", ["ember", "other"]), ("grids.ember.delta", [0.5, "5e-1"]), ("grids.other.layer", "3e0"),
    ("grids.other", [0.1]), ("seeds[0]", 1.5), ("concepts[1]", 7), ("methods[0]", None), ("model", 5),
    ("concepts", "Rome"),  # would be read letter by letter
    ("sizes.train", 4), ("relearn.sweeps[0].lrs[0]", "1e-5"), ("relearn.sweeps[0].budgets", ["4"]),
    ("localize.arms", "ember"), ("trade.strengths[0]", "1e-1"), ("trade.seeds", "all"), ("stability.seeds", 2),
    ("stability.precisions[0]", 64), ("teach.lr", "1e-4"), ("judge", "m"),
], ids=str)  # fmt: skip
def test_a_wrong_type_is_one_line_with_file_key_and_value(load, key, value):
    with pytest.raises(DataError) as caught:
        load(changed(key, value))
    message = str(caught.value)
    entries = {"grids.ember.delta": (key, "5e-1"), "relearn.sweeps[0].budgets": (f"{key}[0]", "4")}
    key, value = entries.get(key, (key, value))
    assert f"mine.yaml, key '{key}': " in message and repr(value) in message
    assert "1.0e-4" in message and "\n" not in message


@pytest.mark.parametrize(("key", "value", "message"), [
    *(("sizes.train", {name: value}, rf"key 'sizes\.train': {name} .*, got {value}$") for name, value in
      {"questions": 4.5, "letters": 1, "open_answers": True, "other_texts": 3, "quest": 1}.items()),
    ("source", "theirs", "key 'source': expected 'ours' or 'released', got 'theirs'$"),
    ("dtype", "theirs", "key 'dtype': expected 'float32', 'bfloat16'.*, got 'theirs'$"),
    ("judge.max_calls", 0, "judge.*max_calls"), ("judge.timeout", "1e1", "judge.*timeout"),
    ("judge.base_url", "localhost", "judge.*base_url"), ("judge", {"base_url": "http://localhost"}, "judge.*model"),
], ids=str)  # fmt: skip
def test_a_size_source_dtype_or_judge_that_cannot_be_is_an_error_that_names_it(load, key, value, message):
    with pytest.raises(DataError, match=rf"mine\.yaml.*{message}"):
        load(changed(key, value))


def test_a_file_that_is_no_mapping_is_named_and_an_unknown_profile_lists_the_known_ones(load):
    for content in ("", "just text", "model: [", "- a"):
        with pytest.raises(EmberError, match=r"mine\.yaml"):
            load(content)
    load()
    load(file="other")
    for name in ("nope", "", "../params/mine", "mine.yaml"):
        with pytest.raises(UnknownNameError, match="known: mine, other"):
            load_profile(name)


def test_ember_is_the_first_arm_the_others_keep_their_order_and_an_unknown_one_lists_them(load):
    """It is an arm in any case: the others run alone and after it. Controls run alone, at the end."""
    wanted = [("ember", False), ("a", False), ("a", True), ("b", False), ("b", True), ("aside", False)]
    for methods in (("a", "ember", "b"), ("ember", "a", "b"), ("a", "b", "ember"), ("a", "b")):
        assert arms(load().model_copy(update={"methods": methods})) == wanted
    assert arms(load(methods=["ember"], controls=[])) == [("ember", False)]
    sweeps = {"settings": {}, "sweeps": [SWEEP | {"arms": ["nope"]}]}
    for part, content, message in (
        ("localize", {"arms": ["none"]}, r"localize of profile mine 'none'; known: aside, ember, ember\+other, other"),
        ("teach", {"arms": ["none"]}, "arm in teach of profile mine 'none'"),
        ("relearn", sweeps, r"sweep of profile mine 'nope'; known: aside, ember, ember\+other, none, other"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            plan(load(**{part: GOOD[part] | content}))


def jobs(profile: Profile, notebook: str) -> list[Job]:
    return [job for job in plan(profile) if job.notebook == notebook]


def values(found: list[Job], *keys: str) -> list[tuple]:
    return [tuple(job.parameters[key] for key in keys) for job in found]


def like(job: Job, notebook: str, *keys: str, **others) -> str:
    """Name of the run of another notebook on the same model, concept and seed."""
    same = {key: job.parameters[key] for key in ("model", "concept_name", "seed", *keys)}
    return run_name(notebook, **same, **others)


def test_every_combination_is_planned_once_and_needs_what_its_own_concept_and_seed_give(load):
    """EMBER the features; an arm after it its saved edit, and the method alone; other methods nothing."""
    found = jobs(load(), ERASE)
    chosen = [("ember", False), ("other", False), ("other", True), ("aside", False)]
    wanted = [(c, s, *arm) for c, s, arm in product(GOOD["concepts"], GOOD["seeds"], chosen)]
    assert values(found, "concept_name", "seed", "method", "ember") == wanted
    assert set(values(found, "model", "profile")) == {("tiny", "mine")}
    for job in found:
        after = tuple(like(job, ERASE, method=m, ember=False) for m in ("ember", "other"))
        features = (like(job, SELECT, **GOOD["fit"]),)
        method = job.parameters["method"]
        assert job.needs == (after if job.parameters["ember"] else () if method == "other" else features)


def test_every_attack_of_a_sweep_meets_every_arm_once_and_needs_its_erasure(load):
    found = jobs(load(), RELEARN)
    wanted = product(GOOD["concepts"], [("none", False), ("other", True)], ["all", "lora"], GOOD["seeds"])
    rows = values(found, "concept_name", "method", "ember", "attack", "seed")
    assert sorted(rows) == sorted((c, *arm, a, s) for c, arm, a, s in wanted)
    for job in found:
        erased = like(job, ERASE, method="other", ember=True)
        assert job.needs == (() if job.parameters["method"] == "none" else (erased,))
    # Overlapping sweeps plan a relearning once, with fewer seeds or several budgets.
    few = [SWEEP, SWEEP | {"arms": ["none"], "attacks": ["all", "mlps"], "seeds": 1}]
    found = jobs(load(relearn={"settings": {}, "sweeps": few}), RELEARN)
    assert len({job.name for job in found}) == len(found) == 2 * (2 * 2 * 2 + 1)
    found = jobs(load(relearn={"settings": {}, "sweeps": [SWEEP | {"budgets": [1, 4]}]}), RELEARN)
    assert [job.parameters["budget"] for job in found].count(4) == len(found) / 2 == 16
    assert all(f"budget={job.parameters['budget']}" in job.name for job in found)


def test_a_part_runs_on_the_first_seeds_if_it_names_anything(load):
    both = [("Rome", 1), ("Greece", 1)]
    for part, notebook, runs, emptied in (
        ("trade", planning.CONTROL, both, "edits"),
        ("stability", planning.STABILITY, both, "seeds"),
        ("teach", planning.TEACH, [(None, 1)], "arms"),
        ("localize", planning.LOCALIZE, [both[0]] * 2 + [both[1]] * 2, "arms"),
    ):
        found = jobs(load(**{part: {"seeds": 1} | GOOD[part]}), notebook)
        assert [(job.parameters.get("concept_name"), job.parameters["seed"]) for job in found] == runs
        assert not jobs(load(**{part: GOOD[part] | {emptied: []}}), notebook)


def test_jobs_need_only_earlier_ones_of_their_own_concept_and_seed_and_the_report_everything(load):
    """Localizing erasures, controls the selection, stability the factorization, a tour EMBER's, teaching nothing."""
    profile = load()
    found = jobs(profile, planning.LOCALIZE)
    assert len(found) == len(GOOD["concepts"]) * len(GOOD["seeds"]) * 2
    for job in found:  # its own erasure, and EMBER's
        first, own = (like(job, ERASE, method=m, ember=m == "other") for m in ("ember", "other"))
        assert job.needs == ((first,) if job.parameters["method"] == "ember" else (first, own))
    assert all(
        job.needs == (like(job, planning.FACTORIZE, "rank", "sparsity"),) for job in jobs(profile, planning.STABILITY)
    )
    assert all(job.needs == (like(job, SELECT, **GOOD["fit"]),) for job in jobs(profile, planning.CONTROL))
    assert not any(job.needs for job in jobs(profile, planning.TEACH))
    *others, report = plan(profile)
    earlier: set[str] = set()
    for job in others:
        assert set(job.needs) <= earlier and job.name not in earlier
        earlier.add(job.name)
    assert report.notebook == "10_report" and set(report.needs) == earlier
    tours = [job for job in others if job.notebook == "00_tour"]
    assert values(tours, "concept_name") == [(concept,) for concept in GOOD["concepts"]]
    for tour in tours:
        alike = {key: tour.parameters[key] for key in ("model", "concept_name")}
        assert tour.needs == (run_name(ERASE, **alike, method="ember", ember=False, seed=1),)


def test_run_name_holds_every_parameter_in_one_order_and_is_a_file_in_the_profile_s_results(tmp_path, monkeypatch):
    given = {"profile": "p", "seed": 1, "concept_name": "Ancient Rome", "model": "m", "zeta": 3, "alpha": 2}
    name = run_name("03_x", **given)
    assert run_name("03_x", **dict(reversed(given.items()))) == name
    assert name == "03_x__model=m__concept=ancient-rome__seed=1__alpha=2__zeta=3"
    for other in ({"seed": 2}, {"alpha": 9}, {"concept_name": "Greece"}, {"ember": True}):
        assert run_name("03_x", **given | other) != name
    name = run_name("x", concept_name="../../etc", model="owner/name")
    assert os.path.basename(name) == name
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    assert manifest_path("p", "run") == tmp_path / "p" / "notebooks" / "run.json"
    assert frame_path("p", "run", "loss") == tmp_path / "p" / "records" / "run" / "loss.parquet"
    assert not (tmp_path / "p").exists()
