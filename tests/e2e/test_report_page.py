"""The report page in a real browser: what a reader sees, by mouse and keyboard, and what a hostile run cannot do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, needs_browser, show
from run_folders import write_run
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from verl.report import __main__ as program
from verl.utils.run_files import METRICS, RECORD, REPORT

SECTIONS = ["alerts", "settings", "curves", "phases", "scores", "rationales", "groups", "map"]
OPENS_WITHIN_S = 3.0
MOST_BYTES = 3_000_000
HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "<!--<script>",
    '{"a": "<b>bold</b>", "b": [1, "</style>"]}',
    "&lt;i&gt; \u2028 \\u003cscript>",
    "<svg/onload=document.title='run'>",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    run = write_run(tmp_path_factory.mktemp("one") / "run", texts=60)
    assert program.main([str(run)]) == 0
    return run / REPORT


@pytest.fixture
def opened(driver: Chrome, page: Path) -> Chrome:
    return open_page(driver, page)


def open_page(driver: Chrome, page: Path, width: int = 1280, dark: bool = False) -> Chrome:
    """The page, drawn; nothing in the console, and no request but for the file."""
    driver.get_log("browser"), driver.get_log("performance")
    show(driver, width, dark=dark)
    driver.get(page.as_uri())
    until_drawn(driver)
    assert driver.get_log("browser") == []
    assert requests_of(driver) == [page.as_uri()]
    return driver


def requests_of(driver: Chrome) -> list[str]:
    """What was asked for since the last call; the browser's own page for new tabs may still be loading then."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in asked if not one["documentURL"].startswith("chrome://")]


def until_drawn(driver: Chrome) -> None:
    driver.execute_script("document.querySelector('#curves .charts').scrollIntoView()")
    wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#curves canvas"))


def wait(driver: Chrome, done):
    return WebDriverWait(driver, 20).until(lambda _: done())


def find(driver: Chrome, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def text_of(driver: Chrome, selector: str) -> str:
    return find(driver, selector).get_property("textContent")


def map_of(driver: Chrome, number: int) -> WebElement:
    """A map, drawn, in view."""
    figure = driver.find_elements(By.CSS_SELECTOR, "#map .maps figure")[number]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    wait(driver, lambda: figure.find_elements(By.TAG_NAME, "canvas"))
    return figure


def to_point(driver: Chrome, figure: WebElement, text: int, moment: int) -> ActionChains:
    """The mouse on the point of a text."""
    over = figure.find_element(By.CLASS_NAME, "u-over")
    x, y = driver.execute_script(
        """const data = JSON.parse(document.getElementById("data").textContent).maps[0].moments;
           const [text, moment, over] = arguments, at = (name, value) => {
             const all = data.flatMap((one) => one[name]), low = Math.min(...all), high = Math.max(...all);
             const room = (high - low) * 0.04;
             return (value - low + room) / (high - low + 2 * room);
           };
           return [(at("x", data[moment].x[text]) - 0.5) * over.clientWidth,
                   (0.5 - at("y", data[moment].y[text])) * over.clientHeight];""",
        text, moment, over,
    )  # fmt: skip
    return ActionChains(driver).move_to_element_with_offset(over, round(x), round(y))


@needs_browser
def test_every_section_is_there_with_its_heading_and_content(opened):
    for section in SECTIONS:
        assert find(opened, f"#{section} h2").is_displayed()
        assert find(opened, f"#{section} .content").get_property("childElementCount") > 0
        assert find(opened, f"nav a[href='#{section}']").is_displayed()
    assert "hardly matter" in text_of(opened, "#alerts") and "step 20" in text_of(opened, "#alerts")
    assert "reward_model.reward_kwargs.temperature" in text_of(opened, "#settings")
    assert "torch" in text_of(opened, "#settings") and "verl.trainer.main_ppo" in text_of(opened, "#settings")
    assert "+6.32" in text_of(opened, "#scores")
    assert "Step 30: this is about" in text_of(opened, "#rationales")
    assert "Best: mean reward" in text_of(opened, "#groups") and "clustering" in text_of(opened, "#groups")
    assert "step 40 of 40" in text_of(opened, "header")


@needs_browser
def test_every_chart_has_a_text_alternative_and_its_lines_in_words(opened):
    figures = opened.find_elements(By.CSS_SELECTOR, "#curves figure")
    assert len(figures) > 20
    for figure in figures:
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        picture = wait(opened, lambda figure=figure: figure.find_elements(By.CSS_SELECTOR, "[role=img]"))[0]
        words = [item.get_property("textContent") for item in figure.find_elements(By.CSS_SELECTOR, ".words li")]
        assert words and all(" at step " in line for line in words)
        assert all(line in picture.get_attribute("aria-label") for line in words)
    tables = opened.find_elements(By.CSS_SELECTOR, ".scroll")
    assert tables and all(t.get_attribute("role") == "region" and t.get_attribute("aria-label") for t in tables)


@needs_browser
def test_a_point_of_the_map_shows_its_text_and_rationale_under_the_mouse(opened):
    for moment, step in ((0, 0), (1, 40)):
        figure = map_of(opened, moment)
        tip = figure.find_element(By.CLASS_NAME, "tip")
        assert not tip.is_displayed()
        to_point(opened, figure, 12, moment).perform()
        wait(opened, tip.is_displayed)
        assert "late trains" not in tip.text or "Step" in tip.text
        shown = tip.text
        assert f"→ Step {step}: this is about" in shown and "\n" in shown


@needs_browser
def test_a_click_on_a_point_chooses_its_text_and_shows_its_neighbours(opened, page):
    figure = map_of(opened, 1)
    to_point(opened, figure, 30, 1).click().perform()
    chosen = int(opened.execute_script("return document.querySelector('#map select').value"))
    data = opened.execute_script("return JSON.parse(document.getElementById('data').textContent).maps[0]")
    place = [(data["moments"][1][axis][30], data["moments"][1][axis][chosen]) for axis in ("x", "y")]
    assert chosen == 30 or sum((a - b) ** 2 for a, b in place) < 0.01
    check_neighbours(opened, data, chosen, moment=1)


def check_neighbours(driver: Chrome, data: dict, chosen: int, moment: int) -> None:
    assert data["texts"][chosen] in text_of(driver, "#map .chosen")
    for one in data["moments"]:
        assert one["rationales"][chosen] in text_of(driver, "#map .chosen")
    cards = driver.find_elements(By.CSS_SELECTOR, "#map .neighbour")
    wanted = data["moments"][moment]["neighbours"][chosen]
    assert len(cards) == len(wanted) == 5
    for card, (text, cosine, plain) in zip(cards, wanted, strict=True):
        shown = card.get_property("textContent")
        assert data["texts"][text] in shown and data["moments"][moment]["rationales"][text] in shown
        assert f"cosine {cosine:.3f}" in shown and f"{plain:.3f} without rationales" in shown


@needs_browser
def test_a_neighbour_is_chosen_by_the_keyboard_alone(opened):
    data = opened.execute_script("return JSON.parse(document.getElementById('data').textContent).maps[0]")
    picture = map_of(opened, 1).find_element(By.CSS_SELECTOR, "[role=img]")
    opened.execute_script("arguments[0].focus()", picture)
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    spoken = text_of(opened, "#spoken")
    assert (
        any(spoken.endswith(text) for text in data["texts"])
        and find(opened, "#map figure:nth-child(2) .tip").is_displayed()
    )
    ActionChains(opened).send_keys(Keys.ENTER).perform()
    chosen = int(opened.execute_script("return document.querySelector('#map select').value"))
    assert chosen != 0 and spoken.endswith(data["texts"][chosen])
    check_neighbours(opened, data, chosen, moment=1)
    # From the map by Tab alone to the button of the first neighbour, through the legend and the controls.
    for _ in range(20):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        focused = opened.switch_to.active_element
        assert has_outline(opened, focused), focused.get_attribute("outerHTML")[:200]
        if focused.tag_name == "button":
            break
    ActionChains(opened).send_keys(Keys.ENTER).perform()
    check_neighbours(opened, data, data["moments"][1]["neighbours"][chosen][0][0], moment=1)
    search = find(opened, "#map input[type=search]")
    search.send_keys("iron pans")
    wait(opened, lambda: "iron pans" in text_of(opened, "#map .chosen"))


def has_outline(driver: Chrome, focused: WebElement) -> bool:
    return driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle !== 'none'", focused)


@needs_browser
def test_the_neighbours_before_training_are_those_of_the_first_vectors(opened):
    data = opened.execute_script("return JSON.parse(document.getElementById('data').textContent).maps[0]")
    map_of(opened, 0)
    opened.find_elements(By.CSS_SELECTOR, "#map input[type=radio]")[0].click()
    check_neighbours(opened, data, 0, moment=0)


@needs_browser
def test_words_that_two_rationales_share_are_marked(opened):
    map_of(opened, 0)
    marks = {mark.text for mark in opened.find_elements(By.CSS_SELECTOR, "#map .neighbour mark")}
    own = text_of(opened, "#map .chosen").lower()
    assert marks and all(word.lower() in own for word in marks) and "this" not in marks


@needs_browser
def test_the_arrow_keys_say_the_values_of_a_chart(opened):
    picture = find(opened, "#curves [role=img]")
    opened.execute_script("arguments[0].focus()", picture)
    ActionChains(opened).send_keys(Keys.HOME, Keys.ARROW_RIGHT).perform()
    chart = opened.execute_script("return JSON.parse(document.getElementById('data').textContent).curves[0].charts[0]")
    spoken = text_of(opened, "#spoken")
    assert spoken.startswith("step 2: mean ")
    assert float(spoken.split("mean ")[1].split(",")[0]) == pytest.approx(chart["lines"][0]["values"][1], rel=1e-3)


@needs_browser
def test_a_name_below_a_chart_hides_its_line(opened):
    name = opened.find_elements(By.CSS_SELECTOR, "#curves .u-legend tr.u-series:not(.range) th")[0]
    opened.execute_script("arguments[0].focus()", name)
    ActionChains(opened).send_keys(Keys.ENTER).perform()
    assert "u-off" in name.find_element(By.XPATH, "..").get_attribute("class")


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_narrow_window_and_is_readable_in_light_and_dark(driver, page, width, dark):
    open_page(driver, page, width, dark)
    map_of(driver, 1)
    assert driver.execute_script("const page = document.documentElement; return page.scrollWidth === page.clientWidth")
    wide = [e for e in driver.find_elements(By.CSS_SELECTOR, "section, figure, .uplot") if e.size["width"] > width]
    assert not wide
    columns = {figure.location["x"] for figure in driver.find_elements(By.CSS_SELECTOR, "#map .maps figure")}
    assert len(columns) == (1 if width == 390 else 2)
    for selector in ("#alerts .alert", "#settings td", "#map .measures", "nav a", "#groups summary"):
        assert contrast(driver, selector) >= 4.5, selector
    lightness = sum(colour_of(driver, "body", "backgroundColor")[:3]) / (3 * 255)
    assert lightness < 0.2 if dark else lightness > 0.9


def contrast(driver: Chrome, selector: str) -> float:
    """Contrast of text to what is behind it, by WCAG 2."""
    first, second = (luminance(colour) for colour in (colour_of(driver, selector, "color"), behind(driver, selector)))
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def behind(driver: Chrome, selector: str) -> list[float]:
    found = driver.execute_script(
        """let e = document.querySelector(arguments[0]), c;
           do { c = getComputedStyle(e).backgroundColor; e = e.parentElement; } while (c === "rgba(0, 0, 0, 0)");
           return c;""",
        selector,
    )
    return numbers(found)


def colour_of(driver: Chrome, selector: str, name: str) -> list[float]:
    return numbers(
        driver.execute_script(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name
        )
    )


def numbers(colour: str) -> list[float]:
    return [float(number) for number in colour[colour.index("(") + 1 : -1].split(",")]


def luminance(colour: list[float]) -> float:
    parts = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_browser
def test_charts_take_the_colours_of_the_readers_new_choice(opened):
    darkest = (
        "const c = document.querySelector('#curves .u-legend .u-marker'); return getComputedStyle(c).borderTopColor"
    )
    light = opened.execute_script(darkest)
    show(opened, 1280, dark=True)
    assert wait(opened, lambda: opened.execute_script(darkest) != light)


@needs_browser
def test_a_hostile_run_shows_as_text_and_runs_nothing(driver, tmp_path):
    run = write_run(tmp_path / "<b>run&amp;", rationale=lambda text, step: HOSTILE[(text + step) % len(HOSTILE)])
    record = json.loads((run / RECORD).read_text())
    record["command"], record["versions"] = HOSTILE[0], {HOSTILE[1]: HOSTILE[0]}
    (run / RECORD).write_text(json.dumps(record))
    with (run / METRICS).open("a") as file:
        file.write(
            json.dumps({"step": 40, f"diag/{HOSTILE[1]}": 1.0, "alerts": [{"name": HOSTILE[1], "text": HOSTILE[0]}]})
            + "\n"
        )
    program.main([str(run)])
    open_page(driver, run / REPORT)
    map_of(driver, 1)
    figure = map_of(driver, 0)
    to_point(driver, figure, 5, 0).click().perform()
    assert driver.title == "Training report: <b>run&amp;"
    assert driver.execute_script("return document.scripts.length") == 6
    assert driver.find_elements(By.CSS_SELECTOR, "img, svg, b, i, iframe") == []
    shown = text_of(driver, "main")
    assert all(text in shown for text in HOSTILE)
    assert driver.get_log("browser") == [] and requests_of(driver) == []


@needs_browser
def test_what_a_script_of_the_data_would_do_is_refused_by_the_page(opened):
    opened.execute_script(
        """const script = document.createElement("script"); script.textContent = "document.title = 'run'";
           const image = document.createElement("img"); image.src = "http://127.0.0.1:9/x";
           document.body.append(script, image);"""
    )
    refused = wait(opened, lambda: opened.get_log("browser"))
    assert opened.title != "run" and "Content Security Policy" in refused[0]["message"]


@needs_browser
def test_runs_stand_beside_each_other(driver, tmp_path):
    runs = [write_run(tmp_path / name, steps=steps, seed=steps) for name, steps in (("short", 20), ("long", 40))]
    out = tmp_path / "both.html"
    assert program.main([*map(str, runs), "--out", str(out)]) == 0
    open_page(driver, out)
    assert [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "#settings table:first-of-type thead th")][
        1:3
    ] == ["short", "long"]
    legend = [name.text for name in driver.find_elements(By.CSS_SELECTOR, "#curves .u-legend tr:not(.range) th")]
    assert {"mean, short", "mean, long"} <= {name.rstrip(":") for name in legend}
    before = text_of(driver, "#groups .content > div:last-child")
    driver.find_elements(By.CSS_SELECTOR, "#groups input[type=radio]")[1].click()
    assert text_of(driver, "#groups .content > div:last-child") != before and "step 40" in text_of(driver, "#groups")
    assert text_of(driver, "#rationales .step:last-child").count("second") == 0
    assert "short: not diagnosed at this step" in text_of(driver, "#rationales")


@needs_browser
def test_a_run_that_has_only_begun_is_shown(driver, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS).write_bytes(b'{"step":1,"reward/mean":0.5,"time/step_s":2.0}\n{"step":2,"rew')
    program.main([str(run)])
    open_page(driver, run / REPORT)
    assert "trainer.diag_freq" in text_of(driver, "#map") and "run.json is missing" in text_of(driver, "#alerts")
    assert "samples/ has no" in text_of(driver, "#groups") and "step 1" in text_of(driver, "header")


@needs_browser
def test_a_long_run_with_many_texts_opens_at_once_and_stays_small(driver, tmp_path):
    words = " ".join(f"word{i}" for i in range(120))
    run = write_run(
        tmp_path / "run", steps=10_000, texts=2000, every=500, size=64,
        rationale=lambda text, step: f"{step} {text} {words}",
    )  # fmt: skip
    program.main([str(run)])
    assert (run / REPORT).stat().st_size < MOST_BYTES
    show(driver, 1280)
    # The page's own time, which other work on the machine does not lengthen.
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    driver.get((run / REPORT).as_uri())
    until_drawn(driver)
    spent = {one["name"]: one["value"] for one in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    driver.execute_cdp_cmd("Performance.disable", {})
    assert 0 < spent["TaskDuration"] < OPENS_WITHIN_S
    assert "10,000 of 10,000" in text_of(driver, "header")
    map_of(driver, 1)
    assert driver.get_log("browser") == []
