"""report.html as a person meets it: in a browser, sorted by hand, in light and dark, and offline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moreau_ext import zoo
from moreau_ext.evaluation import Plan, Results, methods, run
from moreau_ext.evaluation.report import write_report

pytestmark = pytest.mark.slow

INPUTS, METHODS = 5, ("gradient", "smoothgrad", "moreau", "sparse", "group")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    plan = Plan(
        methods=(*METHODS, "random"),
        attacks=("gaussian", "frozen"),
        magnitudes=(0.3, 1.0),
        limit=INPUTS,
        settings=methods.Settings(budget=224),
        attack_samples=8,
        draws=1,
    )
    folder = tmp_path_factory.mktemp("report")
    found = run(zoo.trained("digits_cnn"), zoo.digits("test"), plan, folder)
    write_report(found, folder / "report.html")
    return found


@pytest.fixture(scope="module")
def page(results: Results) -> Path:
    return results.folder / "report.html"


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_file_holds_all_it_shows(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?://", text)
    reader = Reader()
    reader.feed(text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    # Per input itself, and per method its map, the attacked input and that one's map; and the curves.
    assert len(pictures) == INPUTS * (1 + 3 * len(METHODS)) + 1
    for attributes in pictures:
        assert attributes["src"].startswith("data:image/png;base64,")
        assert attributes["alt"]
    assert [a["lang"] for tag, a in reader.tags if tag == "html"] == ["en"]
    values = json.loads(re.search(r'id="values">(.*?)</script>', text)[1])
    assert list(values) == list(METHODS)
    assert len(values["moreau"]["topk"]) == INPUTS


def test_a_table_has_no_gallery(tmp_path: Path) -> None:
    plan = Plan(methods=("gradient",), attacks=("gaussian",), magnitudes=(1.0,), limit=3, checks=False)
    found = run(zoo.trained("tabular_mlp"), zoo.breast_cancer("test"), plan, tmp_path)
    write_report(found, tmp_path / "report.html")
    assert 'id="gallery"' not in (tmp_path / "report.html").read_text()


# --- in a browser --------------------------------------------------------------------------------------------------

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    DRIVER is None or BROWSER is None, reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *quiet):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield driver
    finally:
        driver.quit()


def requests(driver: Any) -> list[str]:
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "chrome://", "about:"))]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_reads_and_sorts_it(results: Results, page: Path, browser: Any, scheme: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280

    # Every picture is there, and a row's pictures stand side by side within the window.
    sizes = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) == INPUTS * (1 + 3 * len(METHODS)) + 1
    assert all(complete and width for complete, width in sizes)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('#gallery tbody tr:first-child > *')].map(c => {"
        "const b = c.querySelector('img').getBoundingClientRect(); return [b.left, b.right, b.top]})"
    )
    assert len(boxes) == 1 + len(METHODS)
    assert all(0 <= left < right <= 1280 for left, right, _ in boxes)
    assert all(a[1] <= b[0] and abs(a[2] - b[2]) < 2 for a, b in pairwise(boxes))

    # Ink and page are apart in both schemes.
    background, colour = (
        [
            int(v)
            for v in re.findall(r"\d+", browser.execute_script(f"return getComputedStyle(document.body).{name}"))[:3]
        ]
        for name in ("backgroundColor", "color")
    )
    assert (sum(background) > sum(colour)) == (scheme == "light")
    assert abs(sum(background) - sum(colour)) > 450

    def shown() -> list[int]:
        return [int(r.get_attribute("data-id")) for r in browser.find_elements(By.CSS_SELECTOR, "#gallery tbody tr")]

    def sorts() -> list[str]:
        heads = browser.find_elements(By.CSS_SELECTOR, "#gallery thead th")
        return [head.get_attribute("aria-sort") for head in heads]

    values = json.loads(browser.execute_script("return document.getElementById('values').textContent"))
    assert shown() == list(range(INPUTS))
    button = browser.find_element(By.CSS_SELECTOR, "#gallery th[data-key=moreau] button")
    Select(browser.find_element(By.ID, "metric")).select_by_value("gini")
    button.click()
    by_gini = sorted(range(INPUTS), key=lambda i: -values["moreau"]["gini"][i])
    assert shown() == by_gini
    assert sorts() == ["none", "none", "none", "descending", "none", "none"]
    # By the keyboard, the other way round.
    button.send_keys(Keys.ENTER)
    assert shown() == by_gini[::-1]
    assert sorts()[3] == "ascending"
    assert "MoreauGrad, Gini of the map, smallest first" in browser.find_element(By.ID, "said").text
    Select(browser.find_element(By.ID, "metric")).select_by_value("distance")
    assert shown() == sorted(range(INPUTS), key=lambda i: values["moreau"]["distance"][i])
    first = browser.find_element(By.CSS_SELECTOR, "#gallery tbody tr td[data-method=moreau] output")
    assert first.text == f"{min(values['moreau']['distance']):.3f}"

    # The tables of numbers sort too.
    table = browser.find_element(By.CSS_SELECTOR, "table.numbers")
    table.find_element(By.CSS_SELECTOR, "th:nth-child(2) button").click()
    column = [
        float(e.get_attribute("data-value")) for e in table.find_elements(By.CSS_SELECTOR, "td:nth-child(2) span")
    ]
    assert column == sorted(column, reverse=True)
    assert len(column) == len(results.plan.methods)

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert requests(browser) == [page.as_uri()]
