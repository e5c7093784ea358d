"""The explorer in a real browser, for tests: gestures, and what is drawn after them."""

import re

import numpy as np

from benchmarks.browser import chromium

CHROMIUM = chromium()
DRAWN = """([pane, view]) => {
    const graph = document.querySelectorAll('.graph.' + view + ' .js-plotly-plot')[pane];
    const heat = graph._fullData.find((trace) => trace.type === 'heatmap');
    const lines = graph._fullData.filter((trace) => trace.name === 'chosen');
    return {
        z: heat ? Array.from(heat.z, (row) => Array.from(row)) : null,
        frame: lines.length && lines[0].x ? lines[0].x.length / 3 : 0,
        traces: graph._fullData.length,
        points: graph._fullData[0]?.x?.length ?? 0,
        lit: graph.drawnPoints ? graph.drawnPoints.lit : null,
    };
}"""


PLACE = """([pane, number]) => {
    const graph = document.querySelectorAll('.graph.scatter .js-plotly-plot')[pane];
    const { xaxis, yaxis } = graph._fullLayout, trace = graph._fullData[0], box = graph.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.l2p(trace.x[number]), box.y + yaxis._offset + yaxis.l2p(trace.y[number])];
}"""


PIXEL = """(number) => {
    const graph = document.querySelector('.graph.scatter .js-plotly-plot'), { xaxis, yaxis } = graph._fullLayout;
    const x = xaxis._offset + xaxis.l2p(graph._fullData[0].x[number]);
    const y = yaxis._offset + yaxis.l2p(graph._fullData[0].y[number]), dense = window.devicePixelRatio;
    const canvas = graph.querySelector('canvas.points').getContext('2d');
    return Array.from(canvas.getImageData(x * dense, y * dense, 1, 1).data);
}"""


class Explorer:
    """A page with what went wrong on it."""

    def __init__(self, page, address):
        self.page, self.wrong = page, []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else self.wrong.append(r.url)
        )
        page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)

    def open(self, address):
        self.page.goto(address)
        self.page.wait_for_selector(".graph.patches .js-plotly-plot .nsewdrag")
        self.page.wait_for_selector(".graph.scatter .js-plotly-plot .nsewdrag")
        self.wait("Where patches look, on average")

    def wait(self, title):
        self.page.get_by_role("heading", name=re.compile(f"^{re.escape(title)} · ")).first.wait_for()

    def drawn(self, view, pane=0):
        return self.page.evaluate(DRAWN, [pane, view])

    def heat(self, expected, pane=0):
        """Wait until the map is what it shall be."""
        for _ in range(200):
            found = np.array(self.drawn("patches", pane)["z"])
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-12):
                return
            self.page.wait_for_timeout(100)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)

    def box(self, view):
        return self.page.locator(f".graph.{view} .nsewdrag").first.bounding_box()

    def cell(self, row, column, grid=(8, 12)):
        box = self.box("patches")
        return box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"]

    def points(self, count, pane=0):
        """Wait until there are so many points."""
        self.page.wait_for_function(
            """([pane, count]) => document.querySelectorAll('.graph.scatter')[pane].querySelector('.js-plotly-plot')
            ._fullData?.[0]?.x?.length === count""",
            arg=[pane, count],
        )

    def places(self, pane=0):
        """Where the points lie, (points, 2)."""
        found = self.page.evaluate(
            """(pane) => { const trace = document.querySelectorAll('.graph.scatter .js-plotly-plot')[pane]._fullData[0];
            return [Array.from(trace.x), Array.from(trace.y)]; }""",
            pane,
        )
        return np.array(found).T

    def lie(self, expected, pane=0):
        """Wait until the points lie where they shall, and are drawn there."""
        near = 1e-5 * float(np.abs(expected).max())
        for _ in range(200):
            if np.allclose(self.places(pane), expected, rtol=0, atol=near):
                break
            self.page.wait_for_timeout(100)
        np.testing.assert_allclose(self.places(pane), expected, rtol=0, atol=near)
        drawn = self.page.evaluate("document.querySelector('.graph.scatter .js-plotly-plot').drawnPoints.x[0]")
        assert abs(drawn - expected[0][0]) <= near

    def point(self, number, pane=0):
        """Where a point is on the screen."""
        return self.page.evaluate(PLACE, [pane, number])

    def click(self, x, y):
        """Move, rest, click: plotly looks where the pointer is every 50 ms only."""
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(200)
        self.page.mouse.click(x, y)

    def drag(self, corners):
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*corner, steps=4)
        self.page.mouse.up()

    def lit(self, expected, pane=0):
        """Wait until these points are lit."""
        for _ in range(200):
            found = sorted(self.drawn("scatter", pane)["lit"] or [])
            if found == sorted(expected):
                return
            self.page.wait_for_timeout(100)
        assert found == sorted(expected)

    def pixel(self, number):
        """The canvas's colour, and how much it covers, where a point is drawn."""
        return self.page.evaluate(PIXEL, number)

    def saved(self, title, folder):
        """A file that a button saves."""
        with self.page.expect_download() as download:
            self.page.get_by_title(title).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def choose(self, label, text):
        self.page.locator(".control", has=self.page.get_by_text(label, exact=True)).get_by_text(
            text, exact=True
        ).click()
