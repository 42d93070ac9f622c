"""The picture of accepted lengths: well-formed, to scale, nothing outside."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.plot_accepted import plot_accepted
from torchweld.decoding.statistics import Statistics

SVG = "{http://www.w3.org/2000/svg}"


def statistics(lengths: tuple[int, ...]) -> Statistics:
    passes, accepted = sum(lengths), sum(n * count for n, count in enumerate(lengths))
    return Statistics(
        "lookup", 9, accepted + passes, passes, passes, 0, accepted + 1, accepted, lengths, 1, 1.0, 1.0, 0.0
    )


def drawn(lengths: tuple[int, ...], title: str = "t") -> ElementTree.Element:
    return ElementTree.fromstring(plot_accepted(statistics(lengths), title))


def bars(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [rect for rect in root.iter(f"{SVG}rect") if rect.get("rx")]


@given(lengths=st.lists(st.integers(0, 10**6), min_size=1, max_size=40).map(tuple), title=st.text("a<&\">'é"))
def test_bars_are_to_scale_and_inside(lengths: tuple[int, ...], title: str) -> None:
    root = drawn(lengths, title)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    found = bars(root)
    assert len(found) == len(lengths)
    highest = max(float(bar.attrib["height"]) for bar in found)
    for bar, count in zip(found, lengths, strict=True):
        assert abs(float(bar.attrib["height"]) - highest * count / max(max(lengths), 1)) <= 0.11
        assert 0 <= float(bar.attrib["x"]) and float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
        assert 0 <= float(bar.attrib["y"]) <= height
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts[0] == title and all(
        0 <= float(text.attrib["y"]) <= height for text in root.iter(f"{SVG}text")
    )
    assert len(list(root.iter(f"{SVG}line"))) <= 7


def test_nothing_to_draw() -> None:
    root = drawn(())
    assert not bars(root) and any("no pass had guesses" in (t.text or "") for t in root.iter(f"{SVG}text"))


def test_grid_lines_stand_at_round_numbers() -> None:
    root = drawn((27, 3))
    numbers = [t.text for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert numbers[:3] == ["0", "10", "20"]
