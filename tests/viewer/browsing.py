"""The page in a real browser, for tests: gestures, and what is drawn after them."""

import numpy as np

from benchmarks.browser import chromium

CHROMIUM = chromium()
GRID = (8, 12)  # of the last block with at least 36 cells, which is shown first
MIDDLE = 4 * 12 + 6
DRAWN = """() => viewer.maps().map((one) => ({ what: one.slot.what, grid: one.its.grid, error: one.error ?? '',
    values: one.values ? Array.from(one.values) : null }))"""


def rows(store, image=0, layer=0, route="sum"):
    """The matrices of an image and of the mean."""
    its = store.layers[layer]
    return store.matrix(its, store.images[image], route), store.mean(its, route)


class Viewer:
    """A page with what went wrong on it."""

    def __init__(self, page, address):
        self.page, self.address, self.wrong = page, address, []
        self._listening = {
            "console": lambda m: self.wrong.append(m.text) if m.type == "error" else None,
            "pageerror": lambda error: self.wrong.append(str(error)),
            "request": lambda r: None if r.url.startswith((address, "data:", "blob:")) else self.wrong.append(r.url),
            "response": lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None,
        }
        for what, listener in self._listening.items():
            page.on(what, listener)

    def leave(self):
        """Hear no more of the page, which the next test opens again."""
        for what, listener in self._listening.items():
            self.page.remove_listener(what, listener)

    def open(self, state=""):
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}#{state}")
        self.until("window.viewer && viewer.maps().length && viewer.points()[0]?.key !== null")
        return self

    def until(self, what, arg=None, timeout=30_000):
        """Wait until JavaScript is true; asked from here, because the page's policy forbids to evaluate text in it."""
        for _ in range(timeout // 50):
            if self.page.evaluate(what, arg):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {what} {arg or ''}")

    def maps(self):
        return self.page.evaluate(DRAWN)

    def state(self):
        return self.page.evaluate("JSON.parse(JSON.stringify(viewer.state))")

    def heat(self, expected, what="image", tolerance=1e-4):
        """Wait until the map of that name is what it shall be."""
        expected = np.asarray(expected, dtype=float).ravel()
        for _ in range(100):
            found = next((np.array(one["values"], dtype=float) for one in self.maps() if one["what"] == what), None)
            near = tolerance * np.abs(expected).max()
            if found is not None and found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=near):
                return
            self.page.wait_for_timeout(100)
        np.testing.assert_allclose(found, expected, rtol=0, atol=near)

    def cell(self, row, column, at=0):
        """The middle of a cell on the screen."""
        canvas = self.page.locator("canvas.map").nth(at)
        canvas.scroll_into_view_if_needed()
        box, (rows, columns) = canvas.bounding_box(), self.maps()[at]["grid"]
        return box["x"] + (column + 0.5) / columns * box["width"], box["y"] + (row + 0.5) / rows * box["height"]

    def points(self, count, at=0):
        """Wait until there are as many points and they stay where they are on the screen, and return their places."""
        self.until(
            "([at, count]) => viewer.points()[at]?.places.length === count && viewer.points()[at].key", arg=[at, count]
        )
        canvas, before = self.page.locator("canvas.plot").nth(at), None
        for _ in range(100):  # text or photos that come late move what is below them, and a scroll bar narrows it
            canvas.scroll_into_view_if_needed()
            box = canvas.bounding_box()
            places = np.array(self.page.evaluate("(at) => viewer.points()[at].places", at))
            places = places + np.array([box["x"], box["y"]])
            if before is not None and np.array_equal(places, before):
                return places
            before = places
            self.page.wait_for_timeout(50)
        raise AssertionError("the points never stay where they are")

    def lit(self, expected, at=0):
        self.until(
            "([at, wanted]) => viewer.lit(at).sort((a, b) => a - b).join() === wanted",
            arg=[at, ",".join(map(str, sorted(expected)))],
        )

    def drag(self, corners):
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*corner, steps=4)
        self.page.mouse.up()

    def choose(self, group, text):
        self.page.get_by_role("radiogroup", name=group).get_by_text(text, exact=True).click()

    def more(self):
        self.page.get_by_text("More", exact=True).click()

    def saved(self, button, folder):
        """A file that a button saves."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=button).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path
