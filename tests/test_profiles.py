"""Profiles and the jobs that follow from them."""

import ast
import json
import os
from dataclasses import replace

import pytest
import yaml

from ember.batch.planning import Job, arms, plan
from ember.batch.profiles import Profile, frame_path, list_profiles, load_profile, manifest_path, run_name
from ember.batch.runner import check_parameters, read_notebook
from ember.data.ours import list_concepts
from ember.errors import DataError, EmberError, UnknownNameError
from ember.methods import METHODS
from ember.models.specs import MODELS
from ember.relearning.train import RelearnConfig
from ember.store.paths import REPOSITORY

PROFILES = list_profiles()
PAPERS = [name for name in PROFILES if name.startswith("paper-")]
RELEASED = (
    "Ancient Rome", "Artificial intelligence", "Baseball", "Cannabis", "COVID-19 pandemic", "Culture of Greece",
    "Gambling", "Golf", "Gun", "Halloween", "Harry Potter", "Heroin", "Nazism", "Pornography", "Republic of Ireland",
    "Uranium", "Valentine's Day", "World War II",
)  # fmt: skip
GOOD = {
    "model": "tiny",
    "source": "released",
    "concepts": ["Rome", "Greece"],
    "methods": ["ember", "other"],
    "controls": ["aside"],
    "seeds": [1, 2],
    "fit": {"rank": 8, "sparsity": 0.1},
    "grids": {"ember": {"delta": [0.5, 2]}, "other": {"lr": [0.1, 0.2], "layer": 3}, "aside": {"delta": 1.0}},
    "sizes": {"train": {"questions": 4}, "test": {"questions": 8}},
    "relearn": {
        "settings": {"points": [10, 20]},
        "sweeps": [{"arms": ["none", "ember+other"], "attacks": ["all", "lora"], "precisions": ["fp32"], "lrs": [0.1]}],
    },
    "localize": {"arms": ["ember", "ember+other"], "texts": 3},
    "trade": {"edits": ["EMBER"], "strengths": [1.0], "questions": 3, "texts": 3, "seeds": 1},
    "stability": {"ranks": [8], "sparsities": [0.1], "seeds": [3], "precisions": ["float32"], "questions": 3},
    "teach": {"arms": ["other"], "tokens": 9, "lr": 0.1, "batch_size": 2, "questions": 3, "texts": 3, "seeds": 1},
    "judge": {"base_url": "http://localhost:1/v1", "model": "m", "key_variable": "SOME_KEY", "max_calls": 9},
}


@pytest.fixture(autouse=True)
def plain_sizes(monkeypatch):
    monkeypatch.delenv("EMBER_SIZES", raising=False)


@pytest.fixture
def params(tmp_path, monkeypatch):
    """An empty folder of profiles in place of ours."""
    folder = tmp_path / "params"
    folder.mkdir()
    monkeypatch.setattr("ember.batch.profiles.notebooks_dir", lambda: tmp_path)
    return folder


@pytest.fixture
def profile(params) -> Profile:
    write(params, GOOD)
    return load_profile("mine")


def write(params, content, name="mine"):
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (params / f"{name}.yaml").write_text(text)


def with_grid(**grid) -> Profile:
    """A profile with this grid for the methods ``ember`` and ``other``, as read from a file."""
    fit = {"rank": 8, "sparsity": 0.1}
    grids = dict.fromkeys(("ember", "other", "aside"), grid)
    rest = ({"settings": {}, "sweeps": []}, {"arms": []}, {"edits": []}, {"seeds": []}, {"arms": []})
    return Profile("mine", "tiny", "ours", ("Rome",), ("ember", "other"), ("aside",), (1,), fit, grids, {}, *rest)


# Our profiles


def test_the_default_and_the_test_profile_are_there():
    assert {"laptop", "smoke"} <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_names_what_exists(name):
    profile = load_profile(name)
    assert set(profile.concepts) <= set(list_concepts() if profile.source == "ours" else RELEASED)
    assert set(profile.methods) <= METHODS.keys()
    assert profile.model in MODELS


@pytest.mark.parametrize("name", PROFILES)
def test_profile_settings_are_accepted_where_they_go(name):
    from ember.evaluation.evaluate import Sizes

    profile = load_profile(name)
    assert {split: Sizes(**size) for split, size in profile.sizes.items()}.keys() == {"train", "test"}
    assert set(profile.methods) <= profile.grids.keys()
    for method in profile.grids:
        cells = profile.cells(method)
        assert cells and all(METHODS[method].config(**settings) for settings in cells.values())


@pytest.mark.parametrize("name", PROFILES)
def test_the_short_sizes_of_the_tests_have_a_grid_for_every_method(name, monkeypatch):
    monkeypatch.setenv("EMBER_SIZES", "smoke")
    profile = load_profile(name)
    assert all(profile.cells(method) for method in profile.methods)


@pytest.mark.parametrize("name", PROFILES)
def test_jobs_have_parameters_the_notebooks_take(name):
    for job in plan(load_profile(name)):
        check_parameters(job.notebook, job.parameters)


@pytest.mark.parametrize("name", PROFILES)
def test_jobs_declare_every_frame_their_notebook_writes(name):
    """What is not declared is not made again when it is lost."""
    for job in plan(load_profile(name)):
        code = "\n".join("".join(c["source"]) for c in read_notebook(job.notebook)["cells"] if c["cell_type"] == "code")
        tree = ast.parse(code)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        keywords = [k for c in calls if getattr(c.func, "id", "") == "write_run" for k in c.keywords]
        written = [name for k in keywords for name in ([k.arg] if k.arg else keys_of(k.value, tree))]
        assert sorted(job.frames) == sorted(written), job.notebook


def keys_of(node: ast.AST, tree: ast.AST) -> list[str]:
    """Keys of a mapping in a notebook that is made from one with literal keys, such as ``{k: … for k in (…)}``."""
    if isinstance(node, ast.Name):
        assigned = {a.targets[0].id: a.value for a in ast.walk(tree)
                    if isinstance(a, ast.Assign) and isinstance(a.targets[0], ast.Name)}  # fmt: skip
        return keys_of(assigned[node.id], tree)
    if isinstance(node, ast.DictComp):
        return keys_of(node.generators[0].iter, tree)
    if isinstance(node, ast.Call):  # mapping.items()
        return keys_of(node.func.value, tree)
    return list(ast.literal_eval(node))


def test_smoke_and_laptop_share_one_factorization():
    smoke, laptop = load_profile("smoke"), load_profile("laptop")
    assert smoke.fit == laptop.fit
    assert (smoke.model, smoke.concepts, smoke.seeds) == (laptop.model, laptop.concepts, laptop.seeds)


def test_the_paper_s_two_models_have_a_profile_each():
    assert {load_profile(name).model for name in PAPERS} == {"gemma-2-2b-it", "llama-3.1-8b-instruct"}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_profile_is_the_paper_s_experiment(name):
    profile = load_profile(name)
    assert (profile.source, profile.concepts) == ("released", RELEASED)
    assert profile.fit["rank"] == {"paper-gemma": 100, "paper-llama": 200}[name]
    assert [cell["delta"] for cell in profile.cells("ember").values()] == [0.5, 1, 2, 5, 10, 50, 100, 200]
    assert arms(replace(profile, controls=())) == [
        ("ember", False), *((m, e) for m in ("snmf", "rmu", "crisp", "pisces") for e in (False, True)),
    ]  # fmt: skip
    first = profile.relearn["sweeps"][0]
    assert (first["attacks"], first["precisions"], first["lrs"]) == (["all"], ["bf16"], [1e-5])
    assert set(first["arms"]) >= {"none", *(f"{e}{m}" for m in profile.methods[1:] for e in ("", "ember+"))}
    assert RelearnConfig(**profile.relearn["settings"]).points[-1] == 2 * 100 * 256
    assert {split: profile.sizes[split]["questions"] for split in profile.sizes} == {"train": 50, "test": 1000}
    # Layers exist, and released autoencoders are of this model.
    depth = {"paper-gemma": 26, "paper-llama": 32}[name]
    for method in ("crisp", "pisces"):
        cells = list(profile.cells(method).values())
        assert {cell["sae"] for cell in cells} == {name.replace("paper-", "") + "-scope"}
        assert max(layer for cell in cells for layer in cell["layers"]) < depth


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_profile_is_planned_without_a_network(name, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    found = plan(load_profile(name))
    assert {job.parameters["concept"] for job in found[:-1]} == set(RELEASED)


def test_an_unknown_source_is_an_error(params):
    write(params, GOOD | {"source": "theirs"})
    with pytest.raises(UnknownNameError, match=r"source in mine\.yaml 'theirs'; known: ours, released"):
        load_profile("mine")


def test_a_profile_is_read_to_the_letter(profile):
    assert (profile.name, profile.model, profile.source) == ("mine", "tiny", "released")
    assert (profile.concepts, profile.seeds, profile.methods) == (("Rome", "Greece"), (1, 2), ("ember", "other"))
    assert (profile.fit, profile.grids, profile.sizes) == (GOOD["fit"], GOOD["grids"], GOOD["sizes"])


# Cells


def test_cells_are_all_combinations_and_the_first_setting_varies_slowest():
    cells = with_grid(layer=[1, 7], lr=[0.001, 0.5]).cells("other")
    assert cells == {
        "layer=1 lr=0.001": {"layer": 1, "lr": 0.001},
        "layer=1 lr=0.5": {"layer": 1, "lr": 0.5},
        "layer=7 lr=0.001": {"layer": 7, "lr": 0.001},
        "layer=7 lr=0.5": {"layer": 7, "lr": 0.5},
    }
    assert list(cells) == ["layer=1 lr=0.001", "layer=1 lr=0.5", "layer=7 lr=0.001", "layer=7 lr=0.5"]


def test_cells_keep_the_order_of_the_file(params):
    write(params, GOOD | {"grids": {"ember": {"delta": [2, 0.5, 10.0]}, "other": {}}, "controls": []})
    assert list(load_profile("mine").cells("ember")) == ["delta=2", "delta=0.5", "delta=10"]


def test_fixed_settings_are_in_every_cell_and_in_no_label():
    """So is a search of one value."""
    cells = with_grid(lr=[0.1, 0.2], layer=3, band="early", k=[5]).cells("other")
    fixed = {"layer": 3, "band": "early", "k": 5}
    assert cells == {"lr=0.1": {"lr": 0.1, **fixed}, "lr=0.2": {"lr": 0.2, **fixed}}


@pytest.mark.parametrize("grid", [{}, {"layer": 3}, {"layer": [3]}], ids=repr)
def test_a_grid_without_a_search_is_one_cell(grid):
    assert with_grid(**grid).cells("other") == {"only cell": {"layer": 3} if grid else {}}


def test_a_setting_that_is_a_list_is_searched_as_a_list_of_lists():
    cells = with_grid(layers=[[3], [3, 4]], mu=2.0).cells("other")
    assert cells == {"layers=[3]": {"layers": [3], "mu": 2.0}, "layers=[3, 4]": {"layers": [3, 4], "mu": 2.0}}


def test_settings_of_the_fit_are_those_of_ember_and_its_controls():
    profile = with_grid(delta=[1.0, 2.0])
    for method in ("ember", "aside"):
        assert list(profile.cells(method).values()) == [profile.fit | {"delta": delta} for delta in (1.0, 2.0)]
    assert list(profile.cells("other").values()) == [{"delta": 1.0}, {"delta": 2.0}]


def test_a_grid_of_ember_may_search_what_the_fit_sets():
    assert with_grid(rank=[4, 6]).cells("ember") == {
        "rank=4": {"rank": 4, "sparsity": 0.1},
        "rank=6": {"rank": 6, "sparsity": 0.1},
    }


def test_cells_do_not_follow_each_other():
    """Changing the settings of one leaves the profile and the other cells as they are."""
    profile = with_grid(delta=[1.0, 2.0], layer=3)
    profile.cells("ember")["delta=1"]["layer"] = 9
    assert [cell["layer"] for cell in profile.cells("ember").values()] == [3, 3]


# Broken profiles


@pytest.mark.parametrize("name", ["nope", "", "../params/mine", "mine.yaml"])
def test_unknown_profile_lists_the_known_ones(params, name):
    write(params, GOOD)
    write(params, GOOD, "other")
    with pytest.raises(UnknownNameError, match="known: mine, other"):
        load_profile(name)


def test_unknown_key(params):
    write(params, GOOD | {"delta": [1]})
    with pytest.raises(UnknownNameError, match=r"mine\.yaml 'delta'; known: concepts, controls, dtype, fit, grids"):
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
        ("- 0.5", "- 5e-1", "grids.ember.delta"),
        ("- 0.2", "- '0.2'", "grids.other.lr"),
        ("layer: 3", "layer: 3e0", "grids.other.layer"),
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
        {"grids": 5},
        {"grids": ["ember", "other"]},
        {"grids": {"ember": 5, "other": {}}},
        {"grids": {"ember": {}, "other": [0.1]}},
        {"seeds": None},
        {"model": 5},
        {"source": 5},
        {"fit": [1]},
        {"fit": {"rank": 8}},
        {"sizes": {"train": 4}},
        {"relearn": {"settings": {}}},
        {"relearn": {"settings": {}, "sweeps": [], "more": 1}},
        {"relearn": {"settings": {}, "sweeps": [{"arms": ["none"], "attacks": ["all"], "precisions": ["fp32"]}]}},
        {"relearn": {"settings": {}, "sweeps": [GOOD["relearn"]["sweeps"][0] | {"lrs": ["1e-5"]}]}},
        {"relearn": {"settings": {}, "sweeps": [GOOD["relearn"]["sweeps"][0] | {"lr": [1.0]}]}},
        {"relearn": {"settings": {}, "sweeps": [GOOD["relearn"]["sweeps"][0] | {"budgets": ["4"]}]}},
        {"localize": {"arms": ["ember"]}},
        {"localize": {"arms": "ember", "texts": 3}},
        {"localize": GOOD["localize"] | {"more": 1}},
        {"trade": GOOD["trade"] | {"strengths": ["1e-1"]}},
        {"trade": GOOD["trade"] | {"seeds": "all"}},
        {"stability": GOOD["stability"] | {"seeds": 2}},
        {"stability": GOOD["stability"] | {"precisions": [64]}},
        {"teach": GOOD["teach"] | {"lr": "1e-4"}},
        {"teach": {key: value for key, value in GOOD["teach"].items() if key != "tokens"}},
        {"fit": GOOD["fit"] | {"precision": 64}},
        {"judge": None},
        {"judge": {"model": "m"}},
        {"judge": GOOD["judge"] | {"url": "x"}},
        {"judge": GOOD["judge"] | {"max_calls": 0}},
        {"judge": GOOD["judge"] | {"timeout": "1e1"}},
        {"sizes": {"train": {"letters": 1}}},
        {"sizes": {"train": {"open_answers": True}}},
    ],
    ids=repr,
)
def test_wrong_shape_is_an_error_that_names_the_file(params, change):
    write(params, GOOD | change)
    with pytest.raises(EmberError, match=r"mine\.yaml"):
        load_profile("mine")


@pytest.mark.parametrize("method", ["ember", "other"])
def test_every_method_needs_a_grid(params, method):
    write(params, GOOD | {"grids": {name: grid for name, grid in GOOD["grids"].items() if name != method}})
    with pytest.raises(DataError, match=rf"mine\.yaml: missing key 'grids\.{method}'"):
        load_profile("mine")


def test_a_method_without_arms_may_have_a_grid(params):
    """The short sizes of the tests serve profiles with more methods."""
    write(params, GOOD | {"methods": ["ember"]})
    assert load_profile("mine").cells("other")


@pytest.mark.parametrize("value", ["early", [1, 2], [[3], [4]], True, None], ids=repr)
def test_a_grid_takes_settings_of_any_kind(params, value):
    write(params, GOOD | {"grids": GOOD["grids"] | {"other": {"x": value}}})
    assert load_profile("mine").grids["other"] == {"x": value}


@pytest.mark.parametrize("content", ["", "just text", "model: [", "- a"])
def test_a_file_that_is_no_mapping(params, content):
    write(params, content)
    with pytest.raises(EmberError, match=r"mine\.yaml"):
        load_profile("mine")


def test_a_folder_of_one_s_own_takes_the_place_of_ours(tmp_path, monkeypatch):
    write(tmp_path, GOOD)
    monkeypatch.setenv("EMBER_PROFILES", str(tmp_path))
    assert list_profiles() == ["mine"] and load_profile("mine").model == "tiny"


def test_the_dtype_may_be_named_and_must_be_one(params):
    write(params, GOOD)
    assert load_profile("mine").dtype is None
    write(params, GOOD | {"dtype": "bfloat16"})
    assert load_profile("mine").dtype == "bfloat16"
    write(params, GOOD | {"dtype": "bf16"})
    with pytest.raises(UnknownNameError, match=r"dtype in mine\.yaml 'bf16'; known: bfloat16, "):
        load_profile("mine")


# EMBER_SIZES


def test_sizes_come_from_the_other_profile_and_nothing_else(params, monkeypatch):
    grids, sizes = {"x": {"lr": 1}, "ember": {"delta": [7]}}, {"train": {"questions": 1}}
    other = GOOD | {"model": "big", "seeds": [9], "grids": grids, "sizes": sizes, "methods": ["x"], "controls": []}
    write(params, GOOD)
    short_parts = {
        "grids": grids, "sizes": sizes, "relearn": {"settings": {"points": [3]}, "sweeps": []},
        "localize": {"arms": [], "texts": 1}, "trade": GOOD["trade"] | {"texts": 1},
        "stability": GOOD["stability"] | {"seeds": []}, "teach": GOOD["teach"] | {"tokens": 99},
        "judge": {},
    }  # fmt: skip
    write(params, other | {"fit": {"rank": 3, "sparsity": 0.5}} | short_parts, "other")
    plain = load_profile("mine")
    monkeypatch.setenv("EMBER_SIZES", "other")
    short = load_profile("mine")
    assert {key: getattr(short, key) for key in short_parts} == short_parts
    assert vars(short) | {key: getattr(plain, key) for key in short_parts} == vars(plain)


def test_unknown_sizes_are_an_error(params, monkeypatch):
    write(params, GOOD)
    monkeypatch.setenv("EMBER_SIZES", "nope")
    with pytest.raises(UnknownNameError, match="'nope'; known: mine"):
        load_profile("mine")


# Jobs


ARMS = [("ember", False), ("other", False), ("other", True), ("aside", False)]


def test_arms_are_ember_alone_then_each_other_method_alone_and_after_ember(profile):
    assert arms(profile) == ARMS


@pytest.mark.parametrize("methods", [("a", "ember", "b"), ("ember", "a", "b"), ("a", "b", "ember"), ("a", "b")])
def test_ember_is_the_first_arm_and_the_others_keep_their_order(profile, methods):
    """It is an arm in any case: the others run after it. Controls run alone, at the end."""
    wanted = [("ember", False), ("a", False), ("a", True), ("b", False), ("b", True), ("aside", False)]
    assert arms(replace(profile, methods=methods)) == wanted


def test_ember_alone_is_one_arm(profile):
    assert arms(replace(profile, methods=("ember",), controls=())) == [("ember", False)]


def erasures(profile: Profile) -> list[Job]:
    return [job for job in plan(profile) if job.notebook == "03_erase_concept"]


def test_every_combination_is_planned_once(profile):
    wanted = [
        {"concept": c, "seed": s, "method": m, "ember": e}
        for c in profile.concepts
        for s in profile.seeds
        for m, e in ARMS
    ]
    found = [job.parameters for job in erasures(profile)]
    assert [{key: p[key] for key in ("concept", "seed", "method", "ember")} for p in found] == wanted
    assert {p["model"] for p in found} == {"tiny"} and {p["profile"] for p in found} == {"mine"}


def test_jobs_need_only_earlier_jobs(profile):
    earlier: set[str] = set()
    for job in plan(profile):
        assert set(job.needs) <= earlier
        earlier.add(job.name)


def test_job_names_are_unique(profile):
    names = [job.name for job in plan(profile)]
    assert len(set(names)) == len(names)


def test_an_erasure_needs_what_its_own_concept_and_seed_give(profile):
    """EMBER the features; an arm after it its saved edit, and the method alone; other methods nothing."""
    jobs = {job.name: job for job in plan(profile)}
    for job in erasures(profile):
        needed = [jobs[name] for name in job.needs]
        assert all(n.parameters[key] == job.parameters[key] for n in needed for key in ("concept", "seed", "model"))
        if job.parameters["ember"]:
            arms_needed = [(n.notebook, n.parameters["method"], n.parameters["ember"]) for n in needed]
            assert arms_needed == [("03_erase_concept", m, False) for m in ("ember", job.parameters["method"])]
        elif job.parameters["method"] in ("ember", "aside"):
            (features,) = needed
            assert features.notebook == "02_select_features"
            assert {key: features.parameters[key] for key in ("rank", "sparsity")} == profile.fit
        else:
            assert needed == []


def test_an_arm_after_ember_finds_the_edit_where_ember_alone_saves_it(profile):
    """The notebook names that run from its own parameters."""
    for job in erasures(profile):
        if job.parameters["ember"]:
            shared = {key: job.parameters[key] for key in ("model", "concept", "seed")}
            assert job.needs[0] == run_name("03_erase_concept", **shared, method="ember", ember=False)


def test_every_attack_of_a_sweep_meets_every_arm_and_needs_its_erasure(profile):
    found = [job for job in plan(profile) if job.notebook == "04_relearn"]
    wanted = {
        (c, m, e, a, s)
        for c in profile.concepts
        for m, e in (("none", False), ("other", True))
        for a in ("all", "lora")
        for s in profile.seeds
    }
    keys = ("concept", "method", "ember", "attack", "seed")
    assert sorted(tuple(job.parameters[key] for key in keys) for job in found) == sorted(wanted)
    for job in found:
        arm = {key: job.parameters[key] for key in ("model", "concept", "seed")}
        erased = run_name("03_erase_concept", **arm, method="other", ember=True)
        assert job.needs == (() if job.parameters["method"] == "none" else (erased,))


def test_overlapping_sweeps_plan_a_relearning_once_and_seeds_may_be_fewer(params):
    (sweep,) = GOOD["relearn"]["sweeps"]
    few = [sweep, sweep | {"arms": ["none"], "attacks": ["all", "mlps"], "seeds": 1}]
    write(params, GOOD | {"relearn": {"settings": {}, "sweeps": few}})
    found = [job for job in plan(load_profile("mine")) if job.notebook == "04_relearn"]
    assert len({job.name for job in found}) == len(found) == 2 * (2 * 2 * 2 + 1)


def test_a_sweep_may_train_on_several_budgets(params):
    (sweep,) = GOOD["relearn"]["sweeps"]
    write(params, GOOD | {"relearn": {"settings": {}, "sweeps": [sweep | {"budgets": [1, 4]}]}})
    found = [job for job in plan(load_profile("mine")) if job.notebook == "04_relearn"]
    assert [job.parameters["budget"] for job in found].count(4) == len(found) / 2 == 16
    assert all(f"budget={job.parameters['budget']}" in job.name for job in found)


def test_what_is_localized_needs_its_erasure_and_ember_s(profile):
    found = [job for job in plan(profile) if job.notebook == "05_localize_coherence"]
    assert len(found) == len(profile.concepts) * len(profile.seeds) * 2
    for job in found:
        arm = {key: job.parameters[key] for key in ("model", "concept", "seed")}
        first, own = (run_name("03_erase_concept", **arm, method=m, ember=m == "other") for m in ("ember", "other"))
        assert job.needs == ((first,) if job.parameters["method"] == "ember" else (first, own))


def test_edits_are_compared_on_the_first_seeds_where_there_are_any(params):
    write(params, GOOD)
    found = [job for job in plan(load_profile("mine")) if job.notebook == "06_control_edits"]
    assert [(job.parameters["concept"], job.parameters["seed"]) for job in found] == [("Rome", 1), ("Greece", 1)]
    assert all(needed.startswith("02_select_features") for job in found for needed in job.needs)
    write(params, GOOD | {"trade": GOOD["trade"] | {"edits": []}})
    assert not [job for job in plan(load_profile("mine")) if job.notebook == "06_control_edits"]


def test_stability_needs_the_factorization_and_no_selection(params):
    write(params, GOOD)
    found = [job for job in plan(load_profile("mine")) if job.notebook == "08_factor_stability"]
    assert [job.parameters["concept"] for job in found] == ["Rome", "Greece"]
    for job in found:
        fit = {key: job.parameters[key] for key in ("model", "concept", "rank", "sparsity", "seed")}
        assert job.needs == (run_name("01_factorize_embeddings", **fit),) and job.parameters["seed"] == 1
    write(params, GOOD | {"stability": GOOD["stability"] | {"seeds": []}})
    assert not [job for job in plan(load_profile("mine")) if job.notebook == "08_factor_stability"]


def test_one_run_teaches_for_all_arms_on_the_first_seeds(params):
    write(params, GOOD)
    found = [job for job in plan(load_profile("mine")) if job.notebook == "09_teach_and_erase"]
    assert [job.parameters["seed"] for job in found] == [1] and not found[0].needs
    write(params, GOOD | {"teach": GOOD["teach"] | {"arms": []}})
    assert not [job for job in plan(load_profile("mine")) if job.notebook == "09_teach_and_erase"]
    write(params, GOOD | {"teach": GOOD["teach"] | {"arms": ["none"]}})
    with pytest.raises(UnknownNameError, match="arm in teach of profile mine 'none'"):
        plan(load_profile("mine"))


def test_an_unknown_arm_to_localize_lists_the_known_ones(params):
    write(params, GOOD | {"localize": {"arms": ["none"], "texts": 1}})
    with pytest.raises(UnknownNameError, match=r"arm in localize of profile mine 'none'; known: aside, ember, "):
        plan(load_profile("mine"))


def test_an_unknown_arm_of_a_sweep_lists_the_known_ones(params):
    (sweep,) = GOOD["relearn"]["sweeps"]
    write(params, GOOD | {"relearn": {"settings": {}, "sweeps": [sweep | {"arms": ["nope"]}]}})
    with pytest.raises(UnknownNameError, match=r"'nope'; known: aside, ember, ember\+other, none, other"):
        plan(load_profile("mine"))


def test_a_tour_needs_an_erasure_of_its_own_concept(profile):
    jobs = {job.name: job for job in plan(profile)}
    tours = [job for job in jobs.values() if job.notebook == "00_tour"]
    assert [tour.parameters["concept"] for tour in tours] == list(profile.concepts)
    for tour in tours:
        assert {jobs[name].parameters["concept"] for name in tour.needs} == {tour.parameters["concept"]}


def test_the_report_is_last_and_needs_everything(profile):
    *others, report = plan(profile)
    assert report.notebook == "10_report"
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
