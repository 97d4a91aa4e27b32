"""Every flag of the programs that embed: what decides a vector reaches the encoder. No model is loaded."""

import inspect
import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import verl.encoder.__main__
import verl.serve.__main__
from verl import GraceEncoder
from verl.embedding.settings import EmbedderSettings
from verl.encoder import embed_file, grace_encoder
from verl.serve import server

# What a flag is given (None = it takes nothing), what it changes, and to what; a new flag has to be added here.
Flags = dict[str, tuple[str | None, str, Any]]
SETTINGS: Flags = {
    "pooling": ("last", "pooling", "last"),
    "span": ("rationale", "span", "rationale"),
    "text_share": ("0.25", "text_share", 0.25),
    "no_rationale_weight": ("0.2", "no_rationale_weight", 0.2),
    "no_centre": (None, "centre", False),
    "max_prompt_length": ("300", "max_prompt_length", 300),
    "max_new_tokens": ("5", "max_new_tokens", 5),
    "system_prompt": ("Say what it is", "system_prompt", "Say what it is"),
    "system_prompt_in": ("user", "system_prompt_in", "user"),
    "template_date": ("2025-01-01", "template_date", "2025-01-01"),
}
BACKEND: Flags = {
    "engine": ("vllm", "engine", "vllm"),
    "device": ("cuda", "device", "cuda"),
    "num_processes": ("2", "num_processes", 2),
}
SERVED_BACKEND: Flags = {
    **BACKEND,
    "tensor_parallel_size": ("2", "tensor_parallel_size", 2),
    "gpu_memory_utilization": ("0.5", "gpu_memory_utilization", 0.5),
}
# Of `GraceEncoder.encode`.
OPTIONS: Flags = {
    "batch_size": ("9", "batch_size", 9),
    "role": ("query", "role", "query"),
    "task": ("web", "task", "web"),
    "no_thinking": (None, "think", False),
    "temperature": ("0.5", "temperature", 0.5),
    "seed": ("3", "seed", 3),
    "not_normalized": (None, "normalize_embeddings", False),
}
DEFAULT_OPTIONS = {
    "batch_size": None, "role": None, "task": None, "think": None, "temperature": None, "seed": 0,
    "normalize_embeddings": True,
}  # fmt: skip
# These say what is embedded and where vectors go to.
OF_THE_ENCODER = {"model", "input", "output", "shard_rows", "store"}
OF_THE_SERVER = {"model", "name", "host", "port", "api_key", "no_auth", "max_batch", "max_queue", "store"}


class NoModel:
    """In place of the processes that hold a model."""

    def __init__(self, spec, num_processes: int = 1) -> None:
        self.facts = SimpleNamespace(hidden=2)
        names = ("engine", "device", "tensor_parallel_size", "gpu_memory_utilization")
        self.given = {**{name: getattr(spec, name) for name in names}, "num_processes": num_processes}

    def close(self) -> None:
        pass


DEFAULT_BACKEND = {
    "engine": "auto", "device": "auto", "tensor_parallel_size": 1, "gpu_memory_utilization": None, "num_processes": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    for name in ("Backend", "ProcessesBackend"):
        monkeypatch.setattr(grace_encoder, name, NoModel)
    for module in (grace_encoder, server):  # on this machine there may be neither
        monkeypatch.setattr(module, "choose_device_and_engine", lambda device, engine: (device, engine, "as given"))
    monkeypatch.setattr(server, "require_gpus", lambda processes: None)


def given(flags: Flags, flag: str) -> list[str]:
    value = flags[flag][0]
    return [f"--{flag}"] if value is None else [f"--{flag}", value]


def encoder_args(folder, *more: str):
    command = ["--model", str(folder), "--input", "texts.txt", "--output", "vectors.parquet"]
    return verl.encoder.__main__.parse_args([*command, *more])


def server_args(folder, *more: str):
    return verl.serve.__main__.parse_args(["--model", str(folder), "--port", "0", *more])


def program_encoder(folder, *more: str) -> GraceEncoder:
    return embed_file.open_encoder(encoder_args(folder, *more), None)


def served_encoder(folder, *more: str) -> GraceEncoder:
    service, listener = server.prepare(server_args(folder, *more))
    listener.close()
    return service.worker._load()


def test_every_flag_has_a_case_here():
    assert vars(encoder_args("model")).keys() == SETTINGS.keys() | BACKEND.keys() | OPTIONS.keys() | OF_THE_ENCODER
    served = SETTINGS.keys() | SERVED_BACKEND.keys() | OF_THE_SERVER | {"no_thinking"}
    assert vars(server_args("model")).keys() == served
    assert {name for _, name, _ in OPTIONS.values()} <= inspect.signature(GraceEncoder.encode).parameters.keys()


@pytest.mark.parametrize("flag", SETTINGS)
@pytest.mark.parametrize("open_encoder", [program_encoder, served_encoder])
def test_a_flag_of_the_settings_changes_them_alone(tiny_folder, tmp_path, open_encoder, flag):
    folder, (_, name, value) = tmp_path / "model", SETTINGS[flag]
    shutil.copytree(tiny_folder, folder)
    own = {"truncation": "left", "centre": flag == "no_centre"}
    (folder / "embedder_config.json").write_text(json.dumps(own))
    found = open_encoder(folder, *given(SETTINGS, flag)).settings.model_dump()
    assert found == {**EmbedderSettings().model_dump(), **own, name: value}


@pytest.mark.parametrize(
    ("open_encoder", "flags", "flag"),
    [(program_encoder, BACKEND, flag) for flag in BACKEND]
    + [(served_encoder, SERVED_BACKEND, flag) for flag in SERVED_BACKEND],
)
def test_a_flag_of_the_engine_changes_it_alone(tiny_folder, open_encoder, flags, flag):
    _, name, value = flags[flag]
    assert open_encoder(tiny_folder).backend.given == DEFAULT_BACKEND
    assert open_encoder(tiny_folder, *given(flags, flag)).backend.given == {**DEFAULT_BACKEND, name: value}


@pytest.mark.parametrize("output", ["vectors.parquet", "vectors"])
@pytest.mark.parametrize("flag", [None, *OPTIONS])
def test_a_flag_of_a_call_reaches_it_whether_a_file_or_a_folder_is_written(
    tiny_folder, tmp_path, monkeypatch, flag, output
):
    seen: list[dict[str, Any]] = []

    def encode(self, texts, *, return_rationales, **options):
        seen.append(options)
        return np.zeros((len(texts), 2), np.float32), [""] * len(texts)

    def encode_to_parquet(self, texts, folder, *, shard_rows, on_part, **options):
        seen.append(options)
        return len(list(texts))

    monkeypatch.setattr(GraceEncoder, "encode", encode)
    monkeypatch.setattr(GraceEncoder, "encode_to_parquet", encode_to_parquet)
    (tmp_path / "texts.txt").write_text("a card\nanother\n")
    command = ["--model", str(tiny_folder), "--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / output)]
    more = [] if flag is None else given(OPTIONS, flag)
    embed_file.run(verl.encoder.__main__.parse_args([*command, *more]))
    changed = {} if flag is None else {OPTIONS[flag][1]: OPTIONS[flag][2]}
    assert seen == [{**DEFAULT_OPTIONS, **changed}]


@pytest.mark.parametrize("open_encoder", [program_encoder, served_encoder])
def test_without_flags_the_settings_are_the_models(tiny_folder, tmp_path, open_encoder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    own = EmbedderSettings(pooling="last", max_new_tokens=7, max_prompt_length=99, system_prompt="Own words")
    own.write(folder)
    assert open_encoder(folder).settings.model_dump() == own.model_dump()


@pytest.mark.parametrize(("more", "thinks"), [([], True), (["--no_thinking"], False)])
def test_a_server_writes_rationales_unless_it_is_told_not_to(tiny_folder, more, thinks):
    service, listener = server.prepare(server_args(tiny_folder, *more))
    listener.close()
    assert service.thinks is service.worker._thinks is thinks


def test_a_store_reaches_the_encoder(tiny_folder, tmp_path):
    encoder = served_encoder(tiny_folder, "--store", str(tmp_path / "store"))
    assert encoder.store is not None and (tmp_path / "store").is_dir()
    encoder.close()
