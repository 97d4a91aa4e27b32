"""The server as a process: its end, its deaths, and its page in a real browser."""

import json
import re
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import openai
import psutil
import pytest
from browser import browser, needs_browser, show
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from serving import NAME, ask, program, served, until_loaded
from tiny import save_tiny

from verl import GraceEncoder


def log_of(process) -> str:
    """What the process wrote besides what was read; it has ended."""
    return process.communicate(timeout=60)[1]


def stop_while_texts_wait(address, process, pool, texts) -> Future:
    """Ask for texts, and send SIGTERM once they wait; return the answer to come when the server has taken note."""
    waits = pool.submit(ask, address, input=texts)
    while "grace_waiting_texts 0.0" in httpx.get(f"{address}/metrics").text:
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGTERM)
    while httpx.get(f"{address}/health").json()["status"] == "ok":
        threading.Event().wait(0.01)
    return waits


def test_sigterm_answers_what_waits_refuses_what_comes_and_ends_with_0(tiny_folder):
    texts = [f"text {i}" for i in range(120)]
    with program(tiny_folder, "--max_batch", "4") as (address, process), ThreadPoolExecutor(1) as pool:
        assert until_loaded(address)["status"] == "ok"
        waits = stop_while_texts_wait(address, process, pool, texts)
        late = ask(address, input="late")
        assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
        assert late.json()["error"]["code"] == "server_draining"
        found = np.array([item["embedding"] for item in waits.result().json()["data"]])
        assert process.wait(60) == 0
        log = log_of(process)
    expected = GraceEncoder(tiny_folder, device="cpu", max_new_tokens=12).encode(texts)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert "embedded first" in log and "text 1" not in log


def test_a_second_signal_ends_it_at_once(tiny_folder):
    texts = [f"text {i}" for i in range(1000)]
    with program(tiny_folder, "--max_batch", "4") as (address, process), ThreadPoolExecutor(1) as pool:
        assert until_loaded(address)["status"] == "ok"
        waits = stop_while_texts_wait(address, process, pool, texts)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        with pytest.raises(httpx.TransportError):
            waits.result()
        log = log_of(process)
    assert re.search(r"SIGTERM: \d+ texts wait and are embedded first\n(.|\n)*SIGINT: ending at once\n", log), log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_as_soon_as_it_listens_ends_it_with_0(tiny_folder, number):
    with program(tiny_folder) as (_, process):
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_model_that_does_not_load_gives_503_and_a_log_line_with_the_way_out(tmp_path):
    folder = save_tiny(tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with program(folder) as (address, process):
        health = until_loaded(address)
        assert health["status"] == "failed" and httpx.get(f"{address}/health").status_code == 503
        refused = ask(address, input="a card")
        assert refused.status_code == 503 and "log names the way out" in refused.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        assert "put it right, end this server and start it again" in log_of(process)


def test_an_engine_that_dies_gives_503_to_all_who_wait(tiny_folder, caplog):
    with served(tiny_folder, "--num_processes", "2", "--max_batch", "4") as (address, service):
        assert ask(address, input="a card").status_code == 200
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(ask, address, input=[f"secret {i} {j}" for j in range(300)]) for i in range(3)]
            while len(service.worker.queue) < 500:
                threading.Event().wait(0.01)
            psutil.Process(service.worker.encoder.backend._processes[0].pid).kill()
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["code"] == "server_failed"
        assert httpx.get(f"{address}/health").json()["status"] == "failed"
        assert "grace_ready 0.0" in httpx.get(f"{address}/metrics").text
        with pytest.raises(openai.InternalServerError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0).embeddings.create(model=NAME, input="a")
    assert "exit code -9" in caplog.text and "start it again" in caplog.text and "secret" not in caplog.text


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tiny_folder):
    with served(tiny_folder) as (running, _):
        yield running


def compare(driver, first: str, second: str) -> None:
    for place, text in (("first", first), ("second", second)):
        field = driver.find_element(By.ID, place)
        field.clear()
        field.send_keys(text)
    driver.find_element(By.ID, "compare").click()
    WebDriverWait(driver, 30).until(lambda _: driver.find_element(By.ID, "compare").is_enabled())


def shown(driver, place: str) -> str:
    return driver.find_element(By.ID, place).text


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_page_shows_similarity_and_both_rationales(driver, address, tiny_folder, width, dark):
    driver.get_log("browser"), driver.get_log("performance")
    show(driver, width, dark=dark)
    driver.get(address)
    texts = ["a card", '<img src=x onerror="document.title=1">']
    compare(driver, *texts)
    vectors, rationales = GraceEncoder(tiny_folder, device="cpu", max_new_tokens=12).encode(
        texts, return_rationales=True
    )
    assert float(shown(driver, "similarity")) == pytest.approx(float(vectors[0] @ vectors[1]), abs=6e-4)
    for place, rationale in zip(("first", "second"), rationales, strict=True):
        assert driver.find_element(By.ID, f"{place}-rationale").get_property("textContent") == rationale
    assert shown(driver, "model") == NAME and driver.title != "1"
    # Nothing but this server is asked, nothing is wider than the window, and the colours are the reader's.
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    sent = [url for url in asked if not url.startswith("chrome://")]  # parts of the browser's own first page
    assert len(sent) >= 5 and all(url.startswith((address, "data:")) for url in sent)
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 200) is dark


@needs_browser
def test_the_page_says_what_is_wrong(driver, address):
    driver.get(address)
    compare(driver, "a card", "x" * 3)
    driver.execute_script("document.getElementById('second').value = 'x'.repeat(110000)")
    driver.find_element(By.ID, "compare").click()
    WebDriverWait(driver, 30).until(lambda _: driver.find_element(By.ID, "error").is_displayed())
    assert "input[1] has 110000 characters" in shown(driver, "error")


def answered(address: str) -> list[str]:
    return re.findall(r'^grace_requests_total.*"200".*$', httpx.get(f"{address}/metrics").text, re.MULTILINE)


@needs_browser
def test_a_page_of_another_site_cannot_use_the_server(driver, address):
    """A browser sends JSON to another origin after a permission only, which the server does not give."""
    driver.get("data:text/html,<title>other</title>")
    before = answered(address)
    body = json.dumps({"model": NAME, "input": "a", "think": False})
    outcomes = driver.execute_async_script(
        """
        const [address, body, done] = arguments, ask = (type, mode) =>
          fetch(`${address}/v1/embeddings`, {method: "POST", mode, headers: {"Content-Type": type}, body})
            .then((answer) => answer.type, () => "refused");
        Promise.all([ask("application/json", "cors"), ask("text/plain", "cors"), ask("text/plain", "no-cors")])
          .then(done);
        """,
        address, body,
    )  # fmt: skip
    # opaque: sent, and the answer 415 kept from the page; refused by browsers that guard loopback addresses.
    assert outcomes[:2] == ["refused", "refused"] and outcomes[2] in ("refused", "opaque")
    assert answered(address) == before
