"""python3 -m verl.push_to_hub against a stand-in of the hub: what is sent, what the card says, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import mteb
import pytest
from hub_stand_in import TOKEN, running_hub, use_hub
from huggingface_hub import ModelCard
from mteb.results import TaskResult
from tiny import save_tiny

import verl.push_to_hub as program
from verl import GraceEncoder
from verl.checkpoint.model_card import write_checkpoint_card
from verl.checkpoint.model_folder import weights_revision
from verl.config import RunConfig
from verl.embedding.centre import Centre
from verl.embedding.settings import EmbedderSettings
from verl.evaluation.mteb_model import model_meta
from verl.step_schedule import StepSchedule
from verl.utils.logging import quiet_libraries

REPO = "me/it"
SETTINGS = EmbedderSettings(base_model="org/base-1B", max_prompt_length=512, max_new_tokens=64)
SENT = [
    "README.md", "chat_template.jinja", "config.json", "embedder_config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved_step(tmp_path_factory):
    """A step of a run, as training writes it, with scores that eval_mteb.py would have written for it."""
    root = tmp_path_factory.mktemp("checkpoints")
    step = root / "run" / "global_step_8"
    folder = save_tiny(step / "huggingface")
    SETTINGS.write(folder)
    write_checkpoint_card(folder, RunConfig(), SETTINGS, StepSchedule(1234, 64, 64), 8, {"torch": "2"})
    (step / "actor").mkdir()
    (step / "actor" / "optimizer.distcp").write_bytes(b"x" * 1000)
    (step / "trainer_state.json").write_text("{}")
    (folder / "merge_model.json").write_text('{"source": "/home/me"}')
    (folder / "notes.pt").write_bytes(b"mine")
    write_scores(root / "results", folder, "STS12", {"test": {"default": 0.51234}})
    write_scores(root / "results", folder, "Local", {"test": {"default": 0.9}}, revision="of a local file")
    return root


def write_scores(results, folder, task, scores, *, revision=None, settings=None, **options):
    """Results as mteb keeps them for a model of ours."""
    encoder = GraceEncoder(folder, device="cpu", settings=settings)
    meta = model_meta(encoder, "run-global_step_8", options)
    result = TaskResult(
        dataset_revision=revision or mteb.get_task(task).metadata.revision,
        task_name=task,
        mteb_version="2.26.24",
        scores={
            split: [
                {"hf_subset": subset, "main_score": score, "languages": ["eng-Latn"]}
                for subset, score in subsets.items()
            ]
            for split, subsets in scores.items()
        },
        evaluation_time=1.0,
    )
    mteb.ResultCache(results).save_to_cache(result, meta)


@pytest.fixture
def root(saved_step, tmp_path):
    return shutil.copytree(saved_step, tmp_path / "checkpoints")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    quiet_libraries()  # what a test itself saves shows no progress
    # Away from a folder `results` of whoever runs the tests.
    monkeypatch.chdir(tmp_path)
    with running_hub() as started:
        use_hub(monkeypatch, started.url, tmp_path / "home")
        started.repos["org/base-1B"] = {"main": {"README.md": b"---\nlicense: mit\nlanguage: de\n---\nA base."}}
        yield started


def push(root, *more):
    return program.main(["--model", str(root / "run" / "global_step_8"), "--repo", REPO, *more])


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.err.startswith("push_to_hub: ") and captured.err.count("\n") == 1, captured.err
    assert TOKEN not in captured.err + captured.out
    return captured.err


def card_of(content, tmp_path):
    file = tmp_path / "card.md"
    file.write_bytes(content)
    return ModelCard.load(file)


# ---- What is sent


def test_the_program_sends_the_model_its_card_and_its_scores_in_one_commit(root, hub, tmp_path):
    command = [
        sys.executable, "-m", "verl.push_to_hub", "--model", str(root / "run" / "global_step_8"), "--repo", REPO,
        "--private", "--results", str(root / "results"),
    ]  # fmt: skip
    home = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    here = str(program.__file__).rsplit("/verl/", 1)[0]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": here, **home}
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert f"uploaded: {hub.url}/me/it/commit/" in done.stdout
    assert hub.private[REPO]
    files, folder = hub.repos[REPO]["main"], root / "run" / "global_step_8" / "huggingface"
    assert [(c["summary"], sorted(c["paths"])) for c in hub.commits] == [("Upload run-global_step_8", SENT)]
    for name in sorted(set(SENT) - {"README.md"}):
        assert files[name] == (folder / name).read_bytes(), name
    weights = (folder / "model.safetensors").read_bytes()
    assert hub.large == {hashlib.sha256(weights).hexdigest(): weights}
    card = card_of(files["README.md"], tmp_path)
    assert card.data.license == "mit" and card.data.language == "de" and card.data.base_model == "org/base-1B"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.tags == ["text-embedding", "rationales", "grpo", "mteb"]
    (score,) = card.data.eval_results
    sts = mteb.get_task("STS12").metadata
    assert card.data.model_name == "it"
    assert (score.task_type, score.dataset_type, score.dataset_revision) == ("STS", sts.dataset["path"], sts.revision)
    assert (score.dataset_split, score.dataset_config) == ("test", "default")
    assert (score.metric_type, score.metric_value) == ("cosine_spearman", 51.234)
    text = (folder / "README.md").read_text()
    assert card.text == ModelCard(text).text and "1,234 samples" in card.text


def test_a_dry_run_lists_everything_and_sends_nothing(root, hub, capsys):
    assert push(root, "--results", str(root / "results"), "--dry_run") == 0
    said = capsys.readouterr().out
    size = (root / "run" / "global_step_8" / "huggingface" / "model.safetensors").stat().st_size
    assert "to me/it (public if it is new), branch main: 8 files" in said
    assert f"model.safetensors {size:,}" in " ".join(said.split())
    left_out = said.partition("left out:\n")[2].partition("scores: ")[0].split()
    assert left_out[::2] == ["../actor", "../trainer_state.json", "merge_model.json", "notes.pt"]
    assert left_out[1::2] == ["1,000", "2", "22", "4"]
    assert "scores: STS12" in said and "other data: Local" in said and "license: mit" in said
    assert "push_to_hub: nothing was sent" in said
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"} and not hub.commits
    assert hub.paths("/org/base-1B/resolve/main/README.md") and not hub.paths("/api/models") + hub.paths("/api/repos")


def test_the_same_command_sends_only_what_changed(root, hub, capsys):
    assert push(root) == 0
    before = len(hub.paths("/large/"))
    assert push(root) == 0 and len(hub.commits) == 1
    EmbedderSettings.read(root / "run" / "global_step_8" / "huggingface").changed(max_new_tokens=9).write(
        root / "run" / "global_step_8" / "huggingface"
    )
    assert push(root, "--license", "apache-2.0") == 0
    assert sorted(hub.commits[1]["paths"]) == ["README.md", "embedder_config.json"]
    assert len(hub.paths("/large/")) == before == 1


def test_an_upload_that_broke_off_is_continued(root, hub, capsys):
    hub.refusals["/api/models/me/it/commit"] = 403
    assert push(root) == 2
    assert "403" in error_of(capsys) and len(hub.paths("/large/")) == 1 and not hub.commits
    del hub.refusals["/api/models/me/it/commit"]
    assert push(root) == 0
    assert len(hub.paths("/large/")) == 1 and len(hub.commits) == 1


def test_a_branch_a_centre_and_a_private_repository(root, hub, capsys):
    folder = root / "run" / "global_step_8" / "huggingface"
    mean = GraceEncoder(folder, device="cpu").encode(["a", "b"], think=False).mean(0)
    Centre(mean, mean).write(folder, SETTINGS)
    SETTINGS.changed(centre=True).write(folder)
    assert push(root, "--revision", "trial") == 0
    assert hub.repos[REPO]["main"] == {} and len(hub.repos[REPO]["trial"]) == 9
    assert hub.repos[REPO]["trial"]["embedder_centre/mean.safetensors"]
    assert push(root, "--private") == 2
    assert "me/it exists and is public" in error_of(capsys)


# ---- The card


def test_the_licence_is_given_or_read_and_never_guessed(root, hub, tmp_path, capsys):
    hub.repos["org/base-1B"]["main"]["README.md"] = b"---\nlanguage: de\n---\n"
    assert push(root) == 2
    assert "card of its base model org/base-1B names none; give it as --license" in error_of(capsys)
    del hub.repos["org/base-1B"]
    shutil.rmtree(tmp_path / "home" / "hub")
    assert push(root) == 2
    assert "org/base-1B cannot be read" in error_of(capsys)
    assert not hub.commits and REPO not in hub.repos
    assert push(root, "--license", "apache-2.0") == 0
    assert card_of(hub.repos[REPO]["main"]["README.md"], tmp_path).data.license == "apache-2.0"


def test_a_base_in_a_folder_has_its_licence_in_its_card(root, hub, tmp_path, capsys):
    folder, base = root / "run" / "global_step_8" / "huggingface", tmp_path / "base"
    base.mkdir()
    EmbedderSettings(base_model=str(base)).write(folder)
    write_checkpoint_card(folder, RunConfig(), EmbedderSettings(base_model=str(base)), StepSchedule(1, 1, 1), 1, {})
    assert push(root) == 2
    assert f"{base} has no README.md; give it as --license" in error_of(capsys)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: x-research\nlicense_link: LICENSE\n---\n")
    assert push(root) == 0
    head = card_of(hub.repos[REPO]["main"]["README.md"], tmp_path).data
    assert (head.license, head.license_name, head.license_link) == ("other", "x-research", "LICENSE")
    assert head.base_model is None and "base_model: none" in capsys.readouterr().out
    # What the card itself says counts more.
    card = folder / "README.md"
    card.write_text(card.read_text().replace("tags:", "license: mit\nbase_model: org/x\nlanguage: fr\ntags:", 1))
    assert push(root) == 0
    head = card_of(hub.repos[REPO]["main"]["README.md"], tmp_path).data
    assert (head.license, head.base_model, head.language) == ("mit", "org/x", "fr")


# ---- The scores


def test_scores_of_other_weights_or_settings_are_not_published(root, hub, tmp_path, capsys):
    folder = root / "run" / "global_step_8" / "huggingface"
    other = save_tiny(tmp_path / "other", seed=1)
    SETTINGS.write(other)
    results = tmp_path / "mixed"
    write_scores(results, other, "STS12", {"test": {"default": 0.7}})
    write_scores(results, folder, "STS12", {"test": {"default": 0.8}}, think=False)
    assert push(root, "--results", str(results)) == 2
    error = error_of(capsys)
    assert "scores with think=False, and the model's is True; 1 folders of scores of other weights" in error
    for change in ({"temperature": 0.5}, {"system_prompt": "Else"}, {"text_share": 0.5}):
        write_scores(results, folder, "STS12", {"test": {"default": 0.9}}, settings=SETTINGS.changed(**change))
    write_scores(results, folder, "Local", {"test": {"default": 0.9}}, revision="x", seed=5)
    assert push(root, "--results", str(results)) == 2
    assert "only tasks that are not mteb's: Local" in error_of(capsys)
    write_scores(results, folder, "STS13", {"test": {"default": 0.6}}, seed=3)
    assert push(root, "--results", str(results)) == 0
    published = card_of(hub.repos[REPO]["main"]["README.md"], tmp_path).data.eval_results
    assert [(score.dataset_name, score.metric_value) for score in published] == [("MTEB STS13 (default)", 60.0)]
    write_scores(results, folder, "STS13", {"test": {"default": 0.61}}, seed=4)
    assert push(root, "--results", str(results)) == 2
    assert "holds 2 sets of scores of these weights" in error_of(capsys)


def test_scores_by_other_settings_of_a_role_are_not_published(root, hub, tmp_path, capsys):
    folder = root / "run" / "global_step_8" / "huggingface"
    roles = {"query": {"template": "{instruction}: {text}"}, "document": {"think": False}}
    own = SETTINGS.changed(**roles, instructions={"default": "find it"})
    own.write(folder)
    results = tmp_path / "roles"
    for other, told in (
        (SETTINGS, "instructions={}, and"),
        (own.changed(document={"think": True}), "document.think=True, and the model's is False"),
        (own.changed(query={"template": "Query: {text}"}), "instructions={}, and"),
        (own.changed(instructions={"default": "find all"}), "instructions={'default': 'find all'}, and"),
        (own.changed(query={**roles["query"], "max_new_tokens": 3}), "query.max_new_tokens=3, and"),
    ):
        shutil.rmtree(results, ignore_errors=True)
        write_scores(results, folder, "STS12", {"test": {"default": 0.7}}, settings=other)
        assert push(root, "--results", str(results)) == 2
        assert f"scores with {told}" in error_of(capsys)
    write_scores(results, folder, "STS12", {"test": {"default": 0.6}}, settings=own)
    assert push(root, "--results", str(results)) == 0


def test_results_for_the_leaderboard_load_with_mteb(root, hub, tmp_path, capsys):
    board = tmp_path / "board"
    assert push(root, "--results", str(root / "results"), "--leaderboard", str(board)) == 0
    commit = capsys.readouterr().out.partition(f"uploaded: {hub.url}/me/it/commit/")[2].split()[0]
    folder = board / "results" / "me__it" / commit
    assert sorted(path.name for path in folder.iterdir()) == ["STS12.json", "model_meta.json", "run_settings.jsonl"]
    cache = mteb.ResultCache(board)
    assert cache.get_models() == [("me__it", commit)]
    (result,) = cache.load_results(models=["me/it"], tasks=["STS12"], include_remote=False).model_results
    assert result.task_results[0].get_score() == pytest.approx(0.51234) and result.model_revision == commit
    meta = json.loads((folder / "model_meta.json").read_text())
    assert (meta["license"], meta["adapted_from"], meta["open_weights"]) == ("mit", "org/base-1B", True)
    assert meta["experiment_kwargs"] is None and meta["name"] == "me/it" and meta["embed_dim"] == 64
    assert [json.loads(line)["task"] for line in (folder / "run_settings.jsonl").read_text().splitlines()] == ["STS12"]
    # Without --results it is the folder `results` here.
    assert push(root, "--leaderboard", str(board)) == 2
    assert "results holds no scores of these weights" in error_of(capsys)


# ---- What is refused


def damage(name):
    return lambda folder: (folder / name).unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage("model.safetensors"), "has no model.safetensors"),
        (cut_weights, "safetensors of"),
        (lose_a_weight, "lacks 1 of the"),
        (damage("tokenizer.json"), "cannot spell 'card'"),
        (damage("embedder_config.json"), "has no embedder_config.json"),
        (damage("README.md"), "has no README.md, the model's card"),
        (damage("config.json"), "holds no config.json; give a model folder"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "README.md cannot be read"),
        (lambda folder: EmbedderSettings(centre=True).write(folder), "mean.safetensors does not exist"),
    ],
)
def test_a_model_that_is_not_whole_is_not_sent(root, hub, capsys, harm, message):
    harm(root / "run" / "global_step_8" / "huggingface")
    assert push(root, "--license", "mit") == 2
    assert message in error_of(capsys)
    assert not {method for method, _ in hub.requests} & {"POST", "PUT"}


def test_a_run_has_to_be_given_with_its_step(root, hub, capsys):
    assert program.main(["--model", str(root / "run"), "--repo", REPO]) == 2
    assert f"give a step of it, such as {root / 'run' / 'global_step_8'}" in error_of(capsys)
    for repo in ("it", "a/b/c", "me/it--"):
        assert program.main(["--model", str(root / "run"), "--repo", repo]) == 2
        assert f"--repo={repo}" in error_of(capsys)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/repos/create", 401, "log in with `hf auth login`, or set HF_TOKEN"),
        ("/api/repos/create", 403, "give its token the right to write there"),
        ("/api/models/me/it/preupload", 404, "there is no such repository or branch"),
        ("/me/it.git/info/lfs", 403, "give its token the right to write there"),
        ("/large/", 403, "give its token the right to write there"),
        ("/api/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_a_refusal_is_one_line_with_the_way_out_and_without_the_token(root, hub, capsys, path, status, message):
    hub.refusals[path] = status
    assert push(root) == 2
    error = error_of(capsys)
    assert message in error and f"me/it on {hub.url}: " in error


def test_no_login_and_no_network(root, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(root, "--license", "mit") == 2
    assert "there is no login of the hub: log in with" in error_of(capsys)
    assert not {method for method, _ in hub.requests} & {"POST", "PUT"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert push(root, "--license", "mit") == 2
    assert "the hub cannot be reached; check the network" in error_of(capsys)


def test_flags_that_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        program.parse_args(["--model", "m", "--repo", REPO, "--dry_run", "--leaderboard", "x"])
    assert "--leaderboard names the commit" in capsys.readouterr().err


def test_the_hash_in_mtebs_results_is_that_of_the_weights(root):
    metas = list((root / "results").rglob("model_meta.json"))
    revision = weights_revision(root / "run" / "global_step_8" / "huggingface")
    assert {json.loads(meta.read_text())["revision"] for meta in metas} == {revision[:16]}
