"""The command line: what it prints, and that errors are one line without a traceback."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.folders import write_concept, write_shared
from helpers.released import make_repository, write_released
from helpers.sound import write_sound
from helpers.tiny import make_loaded

from ember.batch.planning import plan
from ember.batch.profiles import list_profiles, load_profile
from ember.data import released
from ember.data.ours import list_concepts, load_concept
from ember.editing import Edit
from ember.features import ConceptFeatures, concept_features
from ember.models.loading import load_model
from ember.models.specs import MODELS

ROME = "Ancient Rome"
EIGHT = ["--rank", "8", "--features", *map(str, range(8))]
COMMANDS = [
    "reproduce", "erase", "preview", "check-data", "fetch-data", "fetch-model", "import-features", "run-notebook",
    "preflight", "plan", "fetch",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model as a user's own folder."""
    folder = tmp_path_factory.mktemp("model")
    loaded = make_loaded()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def concept(tmp_path, monkeypatch) -> Path:
    """A concept folder of one's own, with small shared data."""
    write_shared(tmp_path / "data" / "shared")
    monkeypatch.setenv("EMBER_DATA", str(tmp_path / "data"))
    return write_concept(tmp_path / "mine")


def assert_one_line(errors: str, *words: str) -> None:
    assert re.fullmatch(r"error: [^\n]+\n", errors) and all(word in errors for word in words), errors


def assert_refused(found: tuple, *words: str) -> None:
    """Exit status 1, nothing printed, and one line of error with these words."""
    assert found[:2] == (1, "")
    assert_one_line(found[2], *words)


def test_every_command_is_listed_and_explains_itself(run):
    status, listed, _ = run("--help")
    assert status == 0
    for command in COMMANDS:
        status, out, _ = run(command, "--help")
        assert status == 0 and out.startswith(f"usage: python -m ember {command}")
        assert re.search(rf"^ +{command}\b", listed, re.M)


def test_wrong_usage_exits_2_and_started_as_a_module_it_shows_no_traceback(run):
    for arguments in ([], ["nope"], ["erase", ROME], ["preview", "--rank", "many"]):
        status, _, errors = run(*arguments)
        assert status == 2 and "usage: " in errors
    command = [sys.executable, "-m", "ember", "preview", "Atlantis"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, "'Atlantis'", *list_concepts())


@pytest.mark.parametrize(("arguments", "words"), [
    *((["preview", name], [repr(name), *list_concepts()]) for name in ("Atlantis", "../ancient", "/etc", "")),
    *((["preview", ROME, "--model", name], [repr(name), *MODELS]) for name in ("nope", "../nope", "/nope/nope")),
    (["check-data", "--model", "nope"], ["'nope'", *MODELS]),
    *((["reproduce", "--profile", name], [repr(name), *list_profiles()]) for name in ("nope", "../smoke", "")),
    (["run-notebook", "nope"], ["'nope'", "00_tour"]),
    (["run-notebook", "10_report", '{"prfile": "x"}'], ["'prfile'", "known: profile"]),
    (["run-notebook", "10_report", '{"profile": 5}'], ["'profile'", "got 5"]),
    (["run-notebook", "10_report", "{profile"], ["JSON"]),
    (["run-notebook", "10_report", "[1]"], ["an object, got [1]"]),
], ids=str)  # fmt: skip
def test_what_is_unknown_or_unfit_is_told_with_what_is_known(run, arguments, words):
    assert_refused(run(*arguments), *words)


def test_dry_run_and_plan_tell_what_would_run_and_what_a_profile_needs(run, no_model):
    """Nothing is there yet, so everything would."""
    status, out, _ = run("reproduce", "--profile", "smoke", "--dry-run")
    assert status == 0 and out.startswith("Profile smoke: ")
    assert out.count("to run") == len(plan(load_profile("smoke"))) > 7
    assert not list(Path(os.environ["EMBER_RESULTS"]).rglob("*.json"))
    status, out, _ = run("plan", "--profile", "paper-gemma")
    profile = load_profile("paper-gemma")
    assert status == 0 and out.count("not measured yet") == len(plan(profile))
    assert profile.needs and out.endswith(f"{profile.needs}\n")
    status, out, _ = run("plan", "--profile", "laptop")
    assert re.search(r"about \d+ s", out) and re.search(r"^About \d+ minutes to go", out, re.M)


def test_fetch_fetches_what_the_profile_reads_and_records_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr("ember.batch.prefetch.fetch_model", lambda name: tmp_path / f"{name}-copy")
    status, out, _ = run("fetch", "smoke", "--record", tmp_path / "deep" / "model.json")
    assert status == 0 and out.startswith("smoke: smollm2-135m and data are ready")
    recorded = json.loads((tmp_path / "deep" / "model.json").read_text())
    assert recorded == {"model": "smollm2-135m", "folder": "smollm2-135m-copy"}


@pytest.fixture
def sound(tmp_path, monkeypatch) -> Path:
    """A concept folder that passes every check, in a data folder in place of ours."""
    monkeypatch.setenv("EMBER_DATA", str(tmp_path / "data"))
    return write_sound(tmp_path / "data")


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("ember.models.loading.load_model", lambda *a, **k: pytest.fail("a model was loaded"))


def test_check_data_passes_sound_data_and_lists_what_to_mend(run, sound, no_model):
    status, out, errors = run("check-data", "--no-model")
    assert (status, errors) == (0, "")
    header, *_, blank, last = out.splitlines()
    assert re.fullmatch(r" *check +wanted +Sound Rome +shared", header)
    assert (blank, last) == ("", "all checks passed")
    assert re.search(r"^ *sentences +≥ 150 +150\b", out, re.M)
    assert "empty question" not in out and "!" not in out
    status, out, _ = run("check-data", sound, "--no-model")
    assert status == 0 and "Sound Rome" in out and "shared" not in out
    path = sound / "sentences.txt"
    texts = path.read_text().splitlines()
    path.write_text("\n".join([text.split()[0] for text in texts[:7]] + texts[7:]) + "\n")
    status, out, errors = run("check-data", "--no-model")
    assert (status, errors) == (1, "")
    assert out.endswith("\n1 checks failed (marked !)\n")
    assert re.search(r"^ *length of sentences +0 +7(\.00)? !", out, re.M)
    assert "\nSound Rome: length of sentences (7)\n" in out
    line = re.compile(r"^  sentences\.txt, line (\d+): 1 words, wanted 5-45: ", re.M)
    assert line.findall(out) == list("12345") and "\n  … 2 more; --all shows them\n" in out
    _, out, _ = run("check-data", "--no-model", "--all")
    assert line.findall(out) == list("1234567") and "more" not in out


def test_check_data_compares_ones_own_folder_with_the_minimum_and_asks_the_model(run, concept, model):
    status, out, _ = run("check-data", concept, "--model", model)
    assert status == 1
    assert re.search(r"^ *sentences +≥ 150 +4(\.00)? !", out, re.M)
    assert "Tiny Rome: length of paragraphs (4)" in out
    assert re.search(r"^ *empty question, probability, concept test +≤ 0\.35 +[01]\.\d\d\b", out, re.M)


def test_check_data_of_released_files_and_of_broken_ones_by_file_line_and_field(run, concept, tmp_path, no_model):
    theirs = write_released(tmp_path / "released") / released.CHOICE
    ours = concept / "questions.jsonl"
    status, out, errors = run("check-data", theirs.parent, "--released", "--no-model")
    assert (status, errors) == (1, "") and re.search(r"^ *check +wanted +Jar Town +Élan$", out, re.M)
    assert re.search(r"^Jar Town: length of sentences \(1\)\n  sentences\[0\]: 4 words", out, re.M)
    theirs.write_text(theirs.read_text().replace('"correct_answer": "flint"', '"correct_answer": "jade"', 1))
    ours.write_text(ours.read_text().replace('"split": "test"', '"split": "dev"', 1))
    for arguments, words in (
        ((theirs.parent, "--released"), (f"{theirs}, line ", "QA_train[1], field 'options'", "'jade'")),
        ((concept,), (f"{ours}, line 1, field 'split'", "'dev'")),
        ((tmp_path / "nope",), (str(tmp_path / "nope"),)),
    ):
        assert_refused(run("check-data", *arguments, "--no-model"), *words)


@pytest.fixture
def upstream(tmp_path, monkeypatch) -> Path:
    """A repository of one's own in place of the authors'."""
    folder = tmp_path / "upstream"
    commit = make_repository(folder)
    monkeypatch.setattr(released, "COMMIT", commit)
    monkeypatch.setattr(released.fetch_released, "__kwdefaults__", {"repository": str(folder), "commit": commit})
    return folder


def test_fetch_data_fetches_once_and_tells_what_there_is(run, upstream, monkeypatch):
    expected = f"released data at {released.COMMIT[:7]}: Jar Town, Élan\n"
    assert run("fetch-data") == (0, expected, "")
    shutil.rmtree(upstream)
    assert run("fetch-data") == (0, expected, "")
    status, out, _ = run("check-data", "--released", "--no-model")
    assert status == 1 and "Jar Town" in out
    monkeypatch.setenv("EMBER_CACHE", str(upstream.parent / "another"))
    assert_refused(run("fetch-data"), "git could not fetch it", "--folder")


def test_fetch_data_with_the_shared_sets_tells_their_commits(run, upstream, tmp_path, monkeypatch):
    commit = "c0ffee" + "0" * 34
    asked = []

    def download(repository, file, *, repo_type, revision):
        asked.append((repository, revision))
        path = tmp_path / "hub" / repository / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("rows")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    status, out, _ = run("fetch-data", "--shared", "--mmlu", "v2")
    assert status == 0 and f"mmlu at {commit}; alpaca at {commit}" in out
    assert asked == [("cais/mmlu", "v2"), ("tatsu-lab/alpaca_eval", "main")]
    status, _, errors = run("fetch-data", "--shared", "--mmlu", "v3")
    assert status == 1 and len(asked) == 2
    assert_one_line(errors, "holds v2", "not v3")


def test_erase_saves_the_edit_that_preview_shows(run, model, concept, tmp_path):
    options = ["--folder", concept, "--model", model, *EIGHT]
    status, out, _ = run("preview", *options)
    *table, last = out.splitlines()
    assert status == 0 and last.startswith(f"{len(table) - 1} rows would change; ") and len(table) > 1
    status, out, _ = run("erase", *options, "--delta", "2", "--output", tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    assert (status, len(edit.changed())) == (0, len(table) - 1)
    assert out == f"{len(edit.changed())} rows of {model.name} edited; saved in {tmp_path / 'edit'}\n"
    assert edit.provenance.config["delta"] == 2.0
    with edit.applied(load_model(str(model))):
        pass


def test_an_edit_that_cannot_be_is_an_error_that_names_the_bound_or_the_path(run, model, concept, tmp_path):
    """The tiny model has d = 32; the default rank is meant for real ones. A file is in the way of the edit's folder."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    options = ["--folder", concept, "--model", model]
    for arguments, words in (
        (["preview", *options, "--rank", "300"], ("rank", "300", "32")),
        (["preview", *options, "--rank", "8", "--features", "8"], ("8", "0..7")),
        (["erase", *options, *EIGHT, "--output", tmp_path / "file" / "edit"], ("file",)),
    ):
        assert_refused(run(*arguments), *words)
    status, _, errors = run("preview", "--folder", concept, "--model", tmp_path / "empty")
    assert status == 1 and errors.startswith("error: ") and "Traceback" not in errors


def test_import_features(run, model, concept, tmp_path):
    """A pickle of arrays becomes safetensors; one that calls something, or lacks a field, is one line of error."""
    loaded, about = load_model(str(model)), load_concept(folder=concept)
    fit = concept_features(loaded, about, rank=5, sparsity=0.1, max_iter=20, cache=False)
    ids = fit.table.token_id.tolist()
    path = tmp_path / "theirs.pkl"
    path.write_bytes(pickle.dumps({"left": fit.factorization.F, "G": fit.factorization.G, "ids": ids}))
    folder = tmp_path / "imported"
    command = ["import-features", path, "--model", model, "--concept", about.name, "--source", "ours"]
    command += ["--folder", concept, "--output", folder]
    status, _, errors = run(*command)
    assert status == 1 and not folder.exists()
    assert_one_line(errors, "no field ", " for F", "'left'", "--field")
    fields = ["--field", "F=left", "--field", "G=G", "--field", "tokens=ids"]
    status, out, _ = run(*command, *fields)
    assert status == 0 and f"5 features of {len(ids)} tokens" in out
    again = ConceptFeatures.load(folder)
    assert torch.equal(again.factorization.F, fit.factorization.F) and again.scores.equals(fit.scores)
    assert_one_line(run(*command, "--field", "left")[2], "ROLE=NAME", "'left'")
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert_one_line(run(*command, *fields)[2], "'os.system'", "not admitted")
