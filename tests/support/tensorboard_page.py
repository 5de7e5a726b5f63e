"""What TensorBoard's page shows, read from its document: charts, pictures, histograms, texts and the table of settings."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.browser import Page, browser, free_port, served

LOAD_S = 30.0
"""For a tab to be complete; it takes a second or two on an idle machine."""

_DEEP = """
function deep(root, selector) {
    const found = [...root.querySelectorAll(selector)];
    for (const node of root.querySelectorAll('*')) if (node.shadowRoot) found.push(...deep(node.shadowRoot, selector));
    return found;
}
function shown(selector) { return deep(document, selector).filter(node => node.checkVisibility()); }
function outer(node, tag) {
    while (node && node.tagName !== tag) node = node.parentNode instanceof ShadowRoot ? node.parentNode.host : node.parentNode;
    return node;
}
"""
"""Custom elements keep their content below shadow roots, which ``querySelectorAll`` does not enter."""

_CHARTS = """
return shown('tf-custom-scalar-multi-line-chart-card').map(card => ({
    category: outer(card, 'TF-CATEGORY-PAGINATED-VIEW').category.name,
    title: deep(card.shadowRoot, 'tf-card-heading')[0].displayName,
    lines: deep(card.shadowRoot, 'path.line').filter(path => path.getBoundingClientRect().width > 0).length,
}));
"""
_IMAGES = """
return shown('tf-image-loader').flatMap(card => deep(card.shadowRoot, 'img').map(image => ({
    tag: card.tag, run: card.run, width: image.complete ? image.naturalWidth : 0, height: image.naturalHeight,
    steps: card._steps.length,
})));
"""
_HISTOGRAMS = """
return shown('tf-histogram-loader').map(card => ({
    tag: card.tag, run: card.run,
    steps: deep(card.shadowRoot, '.histogram path').filter(path => path.getBoundingClientRect().width > 0).length,
}));
"""
_TEXTS = """
return shown('tf-text-loader').map(card => [
    card.run, card.tag, deep(card.shadowRoot, 'pre').map(text => text.innerText).join(),
]);
"""
_CELLS = "return shown('vaadin-grid-cell-content').map(cell => cell.innerText.trim()).filter(text => text);"


@dataclass(frozen=True, order=True)
class Chart:
    category: str
    title: str
    lines: int
    """Drawn, that is those with at least two points."""


@dataclass(frozen=True)
class Image:
    tag: str
    run: str
    width: int
    """Pixels of the picture itself; 0 until it is loaded."""
    height: int
    steps: int
    """Positions of its slider."""


@dataclass(frozen=True)
class Histogram:
    tag: str
    run: str
    steps: int
    """Drawn one behind the other."""


class TensorBoardPage:
    """TensorBoard in a browser; every method opens its tab anew.

    Cards come one by one, so each method is told how many there will be, and returns when these are complete, or, for the
    caller to judge, what there is after :data:`LOAD_S`.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page, self._address = page, address

    def open(self, tab: str) -> None:
        """Charts without smoothing, which would draw a second line for each."""
        self.page.open("about:blank")  # a change after the # alone would keep what other tabs have loaded
        self.page.open(f"{self._address}/#{tab}&_smoothingWeight=0")

    def keep_outliers(self) -> None:
        """From the next tab on charts show every point; TensorBoard's default cuts the largest and smallest off."""
        self.page.open(self._address)
        self.page.script("localStorage.setItem('_ignoreYOutliers', 'false')")

    def act(self, selector: str, place: int, call: str) -> None:
        """Call a method of the ``place``-th visible element that the selector matches."""
        self.page.script(f"{_DEEP} shown(arguments[0])[arguments[1]].{call};", selector, place)

    def charts(self, reached: Callable[[list[Chart]], bool]) -> list[Chart]:
        """Those of the Custom Scalars tab, complete when ``reached`` says so."""
        self.open("custom_scalars")
        return [Chart(**chart) for chart in self._read(_CHARTS, lambda found: reached([Chart(**c) for c in found]))]

    def images(self, number: int) -> list[Image]:
        self.open("images")
        cards = self._read(_IMAGES, lambda found: sum(card["width"] > 0 for card in found) >= number)
        return [Image(**card) for card in cards]

    def histograms(self, number: int) -> list[Histogram]:
        self.open("histograms")
        cards = self._read(_HISTOGRAMS, lambda found: sum(card["steps"] > 0 for card in found) >= number)
        return [Histogram(**card) for card in cards]

    def texts(self, number: int) -> dict[tuple[str, str], str]:
        """Preformatted text by run and tag."""
        self.open("text")
        cards = self._read(_TEXTS, lambda found: sum(bool(text) for *_, text in found) >= number)
        return {(run, tag): text for run, tag, text in cards}

    def hparams(self, rows: int) -> list[list[str]]:
        """The table of the HParams tab, header first; each row begins with its run."""
        self.open("hparams")

        def table(cells: list[str]) -> list[list[str]]:
            ends = [i for i, cell in enumerate(cells) if cell.endswith("tensorboard")] + [len(cells)]
            return [cells[: ends[0]], *(cells[start:end] for start, end in itertools.pairwise(ends))]

        def complete(cells: list[str]) -> bool:
            header, *filled = table(cells)  # cells without a value are left out: rows are shorter than the header
            return sum(len(row) > len(header) / 2 for row in filled) >= rows

        return table(self._read(_CELLS, complete))

    def _read(self, script: str, complete: Callable[[Any], bool]) -> Any:
        """The script's list when it is ``complete``, or when :data:`LOAD_S` are over."""

        def found() -> Any:
            result = self.page.script(_DEEP + script)
            return result if result and complete(result) else None

        with contextlib.suppress(AssertionError):
            return self.page.wait_until(found, "a complete tab", LOAD_S)
        return self.page.script(_DEEP + script)


@contextlib.contextmanager
def tensorboard_page(runs: Path, width: int, height: int) -> Iterator[TensorBoardPage]:
    """TensorBoard over the folder ``runs``, on the loopback interface, in a window of that many pixels."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    program = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", runs.name]
    command = [*program, "--host", "127.0.0.1", "--port", str(port), "--reload_interval", "5"]
    # The page shows the path as it was given.
    with served(command, f"{address}/data/environment", folder=runs.parent), browser(width, height) as page:
        yield TensorBoardPage(page, address)
