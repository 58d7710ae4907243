"""The page in a real browser; skipped where no chromium is installed."""

import os
import shutil

import pytest

from resnet_flax.tools.report import report
from tests.tools.report import workdirs

playwright = pytest.importorskip("playwright.sync_api")

# It is to fetch nothing by itself either.
ARGUMENTS = [
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
  "--disable-quic",
]


@pytest.fixture(scope="module")
def browser():
  chromium = shutil.which("chromium")
  if chromium is None:
    pytest.skip("needs Debian's chromium")
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(
      executable_path=chromium,
      args=ARGUMENTS,
      chromium_sandbox=os.geteuid() != 0,
    )
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_file(trained, tmp_path_factory):
  """A page that has every section."""
  folder = tmp_path_factory.mktemp("report")
  shutil.copytree(trained, folder / "runs" / "trained")
  for depth in (20, 56):
    for seed in range(2):
      workdirs.write(
        folder / "runs" / f"<b>{depth}, {seed}",
        [0.5, 0.7, 0.8 + 0.01 * seed],
        seed=seed,
        model__depth=depth,
      )
  # Its name is long, and has nowhere to break.
  workdirs.write(folder / "runs" / "long", init_from="x" * 300)
  return report.make([folder / "runs"], folder / "out").page


@pytest.mark.parametrize(
  "width",
  [
    pytest.param(1300, id="desk"),
    pytest.param(390, id="phone", marks=pytest.mark.slow),
  ],
)
def test_page_renders(browser, page_file, width, tmp_path):
  said, requested = [], []
  context = browser.new_context(
    viewport={"width": width, "height": 800}, offline=True
  )
  page = context.new_page()
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.on("request", lambda request: requested.append(request.url))
  page.goto(page_file.as_uri())
  page.screenshot(path=tmp_path / "page.png", full_page=True)

  assert said == []
  others = [url for url in requested if not url.startswith("data:")]
  assert others == [page_file.as_uri()]
  sizes = page.locator("img").evaluate_all(
    "all => all.map(i => [i.complete, i.naturalWidth, i.clientWidth])"
  )
  # Of two data sets three of curves each, of one of them the depth, of the
  # other top-5, the confusion matrix and the mistakes.
  assert len(sizes) == 10
  for complete, natural, shown in sizes:
    assert complete
    assert natural > 100
    assert 100 < shown <= width
  # Tables scroll by themselves, the page does not.
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  scrolled, seen = page.locator(".scroll").first.evaluate(
    "e => [e.scrollWidth, e.clientWidth]"
  )
  assert scrolled == seen or width < 1300
  headings = page.locator("h2").all_inner_texts()
  assert headings[:2] == ["Accuracy", "Learning curves"]
  assert headings[-1].startswith("Best checkpoint of group")
  assert page.get_by_text("<b>20, 0", exact=True).is_visible()
  same = page.get_by_text("schedule.drop_percents", exact=True)
  assert not same.is_visible()
  page.locator("summary").first.click()
  assert same.is_visible()
  assert (tmp_path / "page.png").stat().st_size > 50_000
  context.close()
