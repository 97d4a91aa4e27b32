"""The embeddings server over loopback, with the clients that people use."""

import base64
import json
import shutil
import socket
import subprocess
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import psutil
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_openai import OpenAIEmbeddings
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, ask, served
from tiny import save_tiny

from verl import GraceEncoder
from verl.embedding.centre import Centre
from verl.embedding.settings import EmbedderSettings
from verl.encoder import backend
from verl.serve.__main__ import main, parse_args
from verl.serve.access import choose_access
from verl.serve.batching import Job, Options
from verl.serve.messages import EmbeddingsRequest
from verl.workers.rollout.hf import HFRollout

TEXTS = ["a card", "where is my parcel?", "a card", "naïve café", "one two three"]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def server(tiny_folder):
    with served(tiny_folder, "--max_batch", "8") as running:
        yield running


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return GraceEncoder(tiny_folder, device="cpu", max_new_tokens=12)


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def vectors_of(response) -> np.ndarray:
    return np.array([item["embedding"] for item in response.json()["data"]])


def counts(address) -> dict[tuple, float]:
    """Every metric: (name, value of its label) to its value."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    return defaultdict(float, found)


# What is asked for, and what is answered


@pytest.mark.parametrize("form", ["float", "base64", openai.NOT_GIVEN])
@pytest.mark.parametrize("options", [{"think": False}, {**SHORT, "seed": 3}, {}], ids=str)
def test_the_openai_client_gets_the_encoders_vectors(client, encoder, form, options):
    answer = client.embeddings.create(model=NAME, input=TEXTS, encoding_format=form, extra_body=options)
    found = [
        np.frombuffer(base64.b64decode(item.embedding), "<f4") if form == "base64" else item.embedding
        for item in answer.data
    ]
    np.testing.assert_allclose(found, encoder.encode(TEXTS, **options), atol=2e-6)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))


def test_dimensions_are_cut_and_brought_to_unit_length(client, encoder):
    answer = client.embeddings.create(model=NAME, input="a card", dimensions=5, extra_body={"think": False})
    whole = encoder.encode("a card", think=False)
    np.testing.assert_allclose(answer.data[0].embedding, whole[:5] / np.linalg.norm(whole[:5]), atol=2e-6)


def test_rationales_tokens_revision_and_settings_are_told(client, encoder):
    answer = client.embeddings.create(model=NAME, input=TEXTS, extra_body={**SHORT, "return_rationales": True})
    _, rationales = encoder.encode(TEXTS, return_rationales=True, **SHORT)
    assert [item.rationale for item in answer.data] == rationales
    whole = encoder.encode_in_full(TEXTS, **SHORT)
    prompts = [encoder.tokenizer(p.text)["input_ids"] for p in encoder.renderer.render(
        [[{"role": "user", "content": text}] for text in TEXTS])]  # fmt: skip
    assert [len(ids) - len(prompts[0]) for ids in prompts] == [t.prompt_tokens - whole[0].prompt_tokens for t in whole]
    usage = answer.usage
    assert usage.prompt_tokens == sum(text.prompt_tokens for text in whole)
    assert usage.completion_tokens == usage.completion_tokens_details["reasoning_tokens"] > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.revision == encoder.revision and answer.settings == encoder.describe(**SHORT)
    plain = client.embeddings.create(model=NAME, input="a", extra_body={"think": False})
    assert plain.usage.completion_tokens == 0 and not hasattr(plain.data[0], "rationale")


def test_a_text_that_is_cut_to_fit_is_marked(address):
    data = ask(address, input=["a card", "a card " * 300], think=False).json()["data"]
    assert [item["shortened"] for item in data] == [False, True]


def test_the_model_is_listed_and_health_and_the_description_are_there(client, address, encoder):
    (model,) = client.models.list().data
    assert (model.id, model.embedding_dim, model.revision) == (NAME, encoder.embedding_dim, encoder.revision)
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    described = httpx.get(f"{address}/openapi.json").json()
    body = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(EmbeddingsRequest.model_fields)
    assert "settings" in body["properties"]["input_type"]["description"]


def test_langchain_sends_token_ids_by_default_and_is_told_the_setting(address, encoder, monkeypatch):
    def of_bytes(name: str) -> tiktoken.Encoding:  # the real one is downloaded
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding(name, pat_str=".", mergeable_ranks=ranks, special_tokens={})

    monkeypatch.setattr(tiktoken, "get_encoding", of_bytes)
    options = {"model": NAME, "base_url": f"{address}/v1", "api_key": "none",
               "model_kwargs": {"extra_body": {"think": False}}}  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        OpenAIEmbeddings(**options).embed_documents(["a card"])
    chain = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    expected = encoder.encode(TEXTS, think=False)
    np.testing.assert_allclose(chain.embed_documents(TEXTS), expected, atol=2e-6)
    np.testing.assert_allclose(chain.embed_query(TEXTS[1]), expected[1], atol=2e-6)


def test_mtebs_wrapper_gets_the_encoders_vectors(address, encoder):
    from mteb.models import OpenAIAPIEncodeWrapper

    wrapper = OpenAIAPIEncodeWrapper(address, NAME, use_chat_template=False, modalities=["text"])
    assert wrapper.max_length is None  # else it would send truncate_prompt_tokens
    np.testing.assert_allclose(wrapper._get_embeddings(TEXTS), encoder.encode(TEXTS), atol=2e-6)


def test_curl(address, encoder):
    body = json.dumps({"model": NAME, "input": "a card", "think": False})
    command = ["curl", "-sS", f"{address}/v1/embeddings", "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    np.testing.assert_allclose(answer["data"][0]["embedding"], encoder.encode("a card", think=False), atol=2e-6)


def test_a_model_that_embeds_without_rationales_is_served_so(tiny_folder, tmp_path, encoder):
    shutil.copytree(tiny_folder, tmp_path / "model")
    encoder.settings.changed(think=False).write(tmp_path / "model")
    with served(tmp_path / "model") as (address, _):
        for fields in ({}, {"input_type": "query"}):
            found = vectors_of(ask(address, input=TEXTS, **fields))
            np.testing.assert_allclose(found, encoder.encode(TEXTS, think=False), atol=2e-6)
        np.testing.assert_allclose(vectors_of(ask(address, input=TEXTS, think=True)), encoder.encode(TEXTS), atol=2e-6)


def test_a_centre_of_other_vectors_is_the_requests_error(tiny_folder, tmp_path, encoder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = encoder.settings.changed(think=False, centre=True)
    settings.write(folder)
    Centre(None, encoder.encode(TEXTS, think=False).mean(0)).write(folder, settings)
    with served(folder) as (address, _):
        assert ask(address, input=TEXTS).status_code == 200
        refused = ask(address, input=TEXTS, think=True)
        assert refused.status_code == 400
        assert "centre is that of vectors without rationales" in refused.json()["error"]["message"]


def test_a_server_without_thinking_still_thinks_when_asked(tiny_folder, encoder):
    with served(tiny_folder, "--no_thinking") as (address, _):
        np.testing.assert_allclose(vectors_of(ask(address, input=TEXTS)), encoder.encode(TEXTS, think=False), atol=2e-6)
        np.testing.assert_allclose(vectors_of(ask(address, input=TEXTS, think=True)), encoder.encode(TEXTS), atol=2e-6)


# Requests together


def test_requests_that_come_together_share_batches_and_get_their_own_vectors(server, encoder):
    address, service = server
    asked = [
        {"input": [f"text {i}-{j}" for j in range(1 + 3 * (i % 4))], "think": i % 3 > 0, **SHORT} for i in range(16)
    ]
    before = counts(address)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda fields: ask(address, **fields), asked))
    for fields, answer in zip(asked, answers, strict=True):
        options = SHORT if fields["think"] else {"think": False}
        np.testing.assert_allclose(vectors_of(answer), encoder.encode(fields["input"], **options), atol=2e-6)
    after = counts(address)
    texts = sum(len(fields["input"]) for fields in asked)
    assert after["grace_vectors_total", "made"] - before["grace_vectors_total", "made"] == texts
    assert after["grace_requests_total", "200"] - before["grace_requests_total", "200"] == len(asked)
    assert len(service.worker.queue) == 0 and service.bodies.held == 0


def test_no_more_rationales_are_written_at_once_than_the_memory_is_enough_for(tiny_folder, encoder, monkeypatch):
    at_once = []

    class Recorded(HFRollout):
        def __init__(self, lm, stop_ids, max_rows, *more):
            at_once.append(max_rows)
            super().__init__(lm, stop_ids, max_rows, *more)

    monkeypatch.setattr(backend, "HFRollout", Recorded)
    monkeypatch.setattr(backend, "usable_memory", lambda: 2**20)  # a row of a prompt of 200 tokens takes 150 kB
    with served(tiny_folder, "--max_batch", "8") as (address, _):
        found = vectors_of(ask(address, input=TEXTS))
    assert at_once and max(at_once) < len(set(TEXTS))
    np.testing.assert_allclose(found, encoder.encode(TEXTS), atol=2e-6)


def test_a_text_that_several_requests_share_is_embedded_once(server):
    address, service = server
    before = counts(address)
    with ThreadPoolExecutor(4) as pool, held_up(service) as waiting:
        answers = [pool.submit(ask, address, input=["the same", "the same"], **SHORT) for _ in range(4)]
        waiting(4)
    assert len({answer.result().text.split('"model"')[0] for answer in answers}) == 1
    made = counts(address)["grace_vectors_total", "made"] - before["grace_vectors_total", "made"]
    assert made == 2  # with that of the request that was in hand


def test_the_store_gives_the_same_answer_without_work(tiny_folder, tmp_path):
    with served(tiny_folder, "--store", str(tmp_path / "store")) as (address, _):
        first, second = (ask(address, input=TEXTS, return_rationales=True) for _ in range(2))
        found = counts(address)
    assert first.json() == second.json()
    assert (found["grace_vectors_total", "made"], found["grace_vectors_total", "stored"]) == (4, 4)


class held_up:
    """While it lasts the worker waits inside a batch; called with a number, waits for as many texts in the queue."""

    def __init__(self, service) -> None:
        self.worker, self.go, self.inside = service.worker, threading.Event(), threading.Event()

    def __enter__(self):
        real = self.worker._encode

        def waits(encoder, texts, options):
            self.inside.set()
            assert self.go.wait(60)
            return real(encoder, texts, options)

        self.worker._encode = waits
        self.worker.queue.put(Job(["in hand"], Options(False, 0, 0)))
        assert self.inside.wait(60)
        return self.wait

    def wait(self, texts: int) -> None:
        while len(self.worker.queue) != texts:
            threading.Event().wait(0.01)

    def __exit__(self, *_):
        self.go.set()
        del self.worker._encode


def test_what_a_client_that_goes_away_has_not_begun_is_dropped(server):
    address, service = server
    before = counts(address)
    with held_up(service) as waiting:
        body = json.dumps({"model": NAME, "input": [f"gone {i}" for i in range(30)]}).encode()
        with socket.create_connection(service_place(address)) as connection:
            connection.sendall(head(len(body)) + body)
            waiting(30)
        waiting(0)
    assert ask(address, input="still there", think=False).status_code == 200
    after = counts(address)
    assert after["grace_gone_total",] == before["grace_gone_total",] + 1
    assert after["grace_vectors_total", "made"] == before["grace_vectors_total", "made"] + 2
    assert service.bodies.held == 0


def service_place(address: str) -> tuple[str, int]:
    url = httpx.URL(address)
    return url.host, url.port


def head(length: int) -> bytes:
    return (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
        "\r\n\r\n"
    ).encode()


def test_a_full_queue_is_told_with_a_time_to_come_again(server, monkeypatch):
    address, service = server
    monkeypatch.setattr(service.worker.queue, "most_texts", 3)
    with ThreadPoolExecutor(1) as pool, held_up(service) as waiting:
        waits = pool.submit(ask, address, input=["a", "b"], think=False)
        waiting(2)
        refused = ask(address, input=["c", "d"], think=False)
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert_is_error(refused, "rate_limit_error")
    assert waits.result().status_code == 200


# Errors


def assert_is_error(response: httpx.Response, kind: str = "invalid_request_error") -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == kind and error["message"]
    assert len(response.content) < 700
    return error


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"input": []}, 400, "input", "1 to 2048"),
        ({"input": ["a"] * 2049}, 400, "input", "has 2049 texts"),
        ({"input": ["a", ""]}, 400, "input", "input[1] is empty"),
        ({"input": ["a", None]}, 400, "input", "input[1] must be a string"),
        ({"input": 7}, 400, "input", "a string or a list of strings"),
        ({"input": [1, 2]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": [[1, 2]]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": ["a", "b" * 102_401]}, 400, "input", "input[1] has 102401 characters"),
        ({}, 400, "input", "Field required"),
        ({"input": "a", "model": "another"}, 404, "model", "'tiny'"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 65}, 400, "dimensions", "at most the model's 64"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "max_new_tokens": 13}, 400, "max_new_tokens", "at most the server's 12"),
        ({"input": "a", "think": "yes"}, 400, "think", "boolean"),
        ({"input": "a", "seed": 2**63}, 400, "seed", "less than"),
        ({"input": "a", "max_new_token": 3}, 400, None, "max_new_tokens"),
        ({"messages": []}, 400, "input", "Field required"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(address, fields, status, param, message):
    response = ask(address, **fields)
    error = assert_is_error(response)
    assert (response.status_code, error["param"]) == (status, param) and message in error["message"]


def test_paths_methods_and_kinds_of_body_that_are_not_there(address):
    assert assert_is_error(httpx.get(f"{address}/v2")) and httpx.get(f"{address}/v2").status_code == 404
    assert httpx.get(f"{address}/v1/embeddings").status_code == 405
    # What a page in a browser may send to any address without asking.
    response = httpx.post(f"{address}/v1/embeddings", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and assert_is_error(response)
    response = httpx.get(f"{address}/v1/models", headers={"Host": "a.page.example:8000"})
    assert response.status_code == 403 and assert_is_error(response)


def test_a_text_that_does_not_fit_fails_its_request_alone(tiny_folder, tmp_path):
    folder = save_tiny(tmp_path / "strict")
    EmbedderSettings(truncation="error", max_prompt_length=260).write(folder)
    with served(folder) as (address, service):
        with ThreadPoolExecutor(2) as pool, held_up(service) as waiting:
            good = pool.submit(ask, address, input=["a card", "b"], think=False)
            bad = pool.submit(ask, address, input=["c", "long " * 60], think=False)
            waiting(4)
        assert good.result().status_code == 200
        error = assert_is_error(bad.result())
        assert error["message"].startswith("input[1] does not fit") and error["param"] == "input"
        assert ask(address, input="after", think=False).status_code == 200


MARK = "a text that must not come back"
NAMES = st.sampled_from([*EmbeddingsRequest.model_fields, "messages", "x" * 500, MARK])
VALUES = st.recursive(
    st.just(MARK) | st.just({MARK: MARK}) | st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(max_size=30), lambda v: st.lists(v, max_size=4),
    max_leaves=8,
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=300).map(lambda junk: MARK.encode() + junk),
    st.dictionaries(NAMES, VALUES, max_size=6).map(lambda body: json.dumps(body).encode()),
    st.dictionaries(NAMES, VALUES, max_size=6).map(lambda body: json.dumps({**body, "input": [1]}).encode()[:-3]),
    st.integers(1, 200_000).map(lambda depth: b"[" * depth),
    st.integers(1, 3_000).map(lambda digits: b'{"model": "tiny", "input": "a", "seed": 1' + b"0" * digits + b"}"),
    st.just(b'{"model": "tiny", "input": "\\ud800"}'),
)


def test_a_thousand_malformed_bodies_are_refused_and_none_comes_back(server):
    address, service = server
    refused = []

    with httpx.Client(base_url=address, headers={"Content-Type": "application/json"}, timeout=60) as client:

        @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(BODIES)
        def send(body: bytes) -> None:
            response = client.post("/v1/embeddings", content=body)
            assert response.status_code in (200, 400, 404) and MARK not in response.text
            assert response.status_code == 200 or assert_is_error(response)
            refused.append(response.status_code != 200)

        send()
    assert len(refused) >= 1000 and sum(refused) > 900
    assert ask(address, input="a card", think=False).status_code == 200 and service.bodies.held == 0


def test_bodies_that_are_too_large_or_slow_and_clients_that_vanish(server, monkeypatch):
    address, service = server
    bodies = service.bodies
    monkeypatch.setattr(bodies, "most_bytes", 1_000_000)
    response = httpx.post(
        f"{address}/v1/embeddings", content=b"x" * 1_000_001, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413 and assert_is_error(response)

    def parts():
        for _ in range(300):
            yield b"x" * 10_000

    response = httpx.post(f"{address}/v1/embeddings", content=parts(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and bodies.held == 0  # its length was not announced
    monkeypatch.setattr(bodies, "seconds", 0.2)
    with socket.create_connection(service_place(address)) as slow:
        slow.sendall(head(100) + b'{"model"')
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    before = counts(address)["grace_gone_total",]
    monkeypatch.setattr(bodies, "seconds", 30)
    for _ in range(20):
        with socket.create_connection(service_place(address)) as vanishes:
            vanishes.sendall(head(100) + b'{"model"')
    while counts(address)["grace_gone_total",] < before + 20:
        threading.Event().wait(0.01)
    assert bodies.held == 0 and ask(address, input="a card", think=False).status_code == 200


def test_bodies_of_all_clients_together_are_bounded(server, monkeypatch):
    address, service = server
    monkeypatch.setattr(service.bodies, "most_in_all", 1500)
    with socket.create_connection(service_place(address)) as slow:
        slow.sendall(head(2000) + b" " * 1000)
        while service.bodies.held != 1000:
            threading.Event().wait(0.01)
        refused = ask(address, input="b" * 600, think=False)
        assert refused.status_code == 429 and "retry-after" in refused.headers
    assert ask(address, input="b" * 600, think=False).status_code == 200


def test_memory_does_not_grow_with_requests(server):
    address, _ = server
    process = psutil.Process()
    body = {"model": NAME, "input": [f"text {i}" for i in range(4)], "think": False}
    with httpx.Client(base_url=address, timeout=60) as client:

        def send(times: int) -> int:
            for turn in range(times):
                client.post("/v1/embeddings", json=body | {"user": "u" * 100_000})
                client.post("/v1/embeddings", json={"input": "u" * 1_000_000, "model": NAME, "seed": turn})
            return process.memory_info().rss

        memory = [send(10), send(30), send(30)]
    # What is kept of requests is kept in both windows; what is allocated once, by whoever, in one of them.
    assert min(memory[1] - memory[0], memory[2] - memory[1]) < 15e6  # the bodies of a window are 33 MB


# Who may use it


def test_a_key_is_asked_for_and_guards_what_it_should(tiny_folder, monkeypatch, caplog):
    monkeypatch.setenv("GRACE_API_KEY", "a-secret")
    with served(tiny_folder, "--no_thinking") as (address, _):
        for header in ({}, {"Authorization": "Bearer another"}, {"Authorization": "a-secret"}):
            for path in ("/v1/models", "/metrics"):
                response = httpx.get(f"{address}{path}", headers=header)
                assert response.status_code == 401 and assert_is_error(response)["code"] == "invalid_api_key"
        assert ask(address, input="a").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        good = openai.OpenAI(base_url=f"{address}/v1", api_key="a-secret")
        assert good.embeddings.create(model=NAME, input="very private words").data
        metrics = httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer a-secret"})
        assert metrics.status_code == 200
    assert "a-secret" not in caplog.text + metrics.text and "private" not in caplog.text + metrics.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "a.name.example"])
def test_a_server_for_other_machines_needs_a_key_or_words(host):
    with pytest.raises(ValueError, match="GRACE_API_KEY.*--no_auth"):
        choose_access(host, None, None, False)
    assert choose_access(host, None, "key", False).key == "key"
    open_to_all = choose_access(host, None, None, True)
    assert open_to_all.key is None and not open_to_all.own_names_only
    for own in ("127.0.0.1", "::1", "localhost"):
        assert choose_access(own, None, None, False).own_names_only


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines"),
        (["--no_auth", "--api_key", "k"], "give one of them"),
        (["--api_key", ""], "printable ASCII"),
        (["--max_queue", "100"], "--max_queue 100 must be 2048 or more"),
        (["--max_batch", "0"], "--max_batch 0"),
        (["--device", "cuda", "--num_processes", "4096"], "num_processes=4096 needs as many GPUs"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--port", "70000"], "give an address of this machine, and a port that is free"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_loaded(tiny_folder, capsys, wrong, message):
    assert main(["--model", str(tiny_folder), "--port", "0", *wrong]) == 2
    assert message in capsys.readouterr().err
    assert parse_args(["--model", "m"]).host == "127.0.0.1"


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    assert main(["--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
