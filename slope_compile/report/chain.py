"""The chain from the trained model to what is deployed, as a picture: stages are boxes, comparisons are arrows.

Drawn twice, lying for a wide window and for paper, standing for a phone; the style sheet shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from unicodedata import east_asian_width

from slope_compile.report.data import RunData
from slope_compile.report.figures import SAME_LINE, plural
from slope_compile.report.hops import Hop, hops_of, share_text
from slope_compile.report.markup import Content, Markup, tag
from slope_compile.report.tables import (
    STATUS,
    absent,
    cell,
    check_name,
    code,
    column,
    details,
    figure_cell,
    section,
    sentences,
    status,
    table,
)

BOX, GAP, TALL, PITCH = 150, 124, 70, 116  # the lying picture: width of a box and of a gap, height, rows apart
LEFT, WIDE, LOW, STEP = 24, 306, 48, 64  # the standing one: left edge and width of a box, height, gap below it
APART = 10  # between arrows beside each other
LONGEST = 22  # letters of a line in a box

STAGES = {
    "trained": ("Trained model", "PyTorch, weights", "compressed as it runs"),
    "folded": ("Folded model", "PyTorch, weights", "are codes × scale"),
    "onnx": ("ONNX file", "ONNX Runtime,", "optimizations off"),
    "onnx-default": ("ONNX, deployed", "ONNX Runtime,", "its default options"),
    "placed": ("Placed ONNX", "", ""),
    "engine": ("Engine", "", ""),
}
NOTE = (
    "Each arrow compares two neighbours on the same inputs. Its error is the largest difference between their outputs, "
    "relative to the largest output; what is allowed is derived from the arithmetic, not chosen."
)


@dataclass(frozen=True)
class Box:
    """A stage: its title, two lines below, and its place in the lying picture."""

    name: str
    lines: tuple[str, str, str]
    column: int
    row: int


def chain(data: RunData) -> Markup:
    """Return the chain of each target that was verified."""
    title = "The chain"
    if not data.verdicts:
        return section("chain", title, absent("Nothing was verified: there is no chain to show."))
    parts: list[Content] = []
    for target, verdict in data.verdicts.items():
        hops = hops_of(verdict)
        parts.append(tag("h3", f"For {target}", class_="target") if len(data.verdicts) > 1 else None)
        parts.append(_picture(data, target, hops) if hops else absent(f"No stages were compared for {target}."))
    return section("chain", title, sentences([NOTE]), *parts)


def _picture(data: RunData, target: str, hops: Sequence[Hop]) -> Markup:
    boxes = _boxes(data, target, hops)
    caption = f"The chain for {target}. " + "; ".join(hop.words for hop in hops)
    numbers = details(f"The {plural(len(hops), 'comparison')} in numbers", _numbers(target, hops))
    return tag("div", _lying(boxes, hops, caption), _standing(boxes, hops, caption), numbers, class_="chain")


def _numbers(target: str, hops: Sequence[Hop]) -> Markup:
    rows = [
        [
            code(f"{hop.start} → {hop.end}"),
            check_name(hop.check),
            cell(status(hop.status)),
            figure_cell(hop.error_text),
            figure_cell(hop.allowed_text.removeprefix("allowed ") or "–"),
            figure_cell(share_text(hop.share)),
        ]
        for hop in hops
    ]
    head = ["Stages", "Check", "Status", column("Error"), column("Allowed"), column("Share of allowed")]
    return table(f"Comparisons of the chain for {target}", head, rows)


def _boxes(data: RunData, target: str, hops: Sequence[Hop]) -> dict[str, Box]:
    """Return the stages in the order of the hops; a second hop from a stage starts a row of its own."""
    places: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    for hop in hops:
        column, row = places.setdefault(hop.start, (0, len({row for _, row in taken})))
        taken.add((column, row))
        if hop.end not in places:
            rows = len({row for _, row in taken})
            place = (column + 1, row) if (column + 1, row) not in taken else (column + 1, rows)
            places[hop.end] = place
            taken.add(place)
    return {name: Box(name, _lines(data, target, name), *place) for name, place in places.items()}


def _lines(data: RunData, target: str, name: str) -> tuple[str, str, str]:
    title, first, second = STAGES.get(name, (name, "", ""))
    header = (data.builds.get(target) or {}).get("header") or {}
    if name in ("placed", "engine") and not header:
        first, second = f"for {target}", "not built"
    elif name == "placed":
        first, second = "placed.onnx", f"{str(header.get('precision') or '').upper()} for {target}".strip()
    elif name == "engine":
        first = f"{header.get('backend')} {header.get('version')}"
        second = f"{target}, SM {header.get('sm')}"
    return _short(title), _short(first), _short(second)


def _short(text: str) -> str:
    """Leave out the middle of what has no room in a box; letters of East Asia and pictures take two places."""
    places = [2 if east_asian_width(letter) in "WF" else 1 for letter in text]
    if sum(places) <= LONGEST:
        return text
    ahead, behind = list(accumulate(places)), list(accumulate(reversed(places)))
    first, last = (sum(place <= LONGEST // 2 - 1 for place in counted) for counted in (ahead, behind))
    return f"{text[:first]}…{text[-last:]}"


def _lying(boxes: dict[str, Box], hops: Sequence[Hop], caption: str) -> Markup:
    columns, rows = (1 + max(getattr(box, key) for box in boxes.values()) for key in ("column", "row"))
    width, height = columns * BOX + (columns - 1) * GAP + 4, rows * PITCH - (PITCH - TALL) + 4
    arrows = [_lying_hop(hop, boxes[hop.start], boxes[hop.end]) for hop in hops]
    drawn = [_box(box, _x(box), _y(box), BOX, TALL, centred=True) for box in boxes.values()]
    return _svg(caption, width, height, "lying", [*arrows, *drawn])


def _lying_hop(hop: Hop, start: Box, end: Box) -> Markup:
    tip, middle = _x(end), _y(end) + TALL / 2
    if start.row == end.row:
        path, left = f"M{_x(start) + BOX} {middle}H{tip - 9}", _x(start) + BOX
    else:
        trunk = _x(start) + BOX / 2 - APART * (end.row - 1)  # each row has its own: what one says is not the other's
        path, left = f"M{trunk:g} {_y(start) + TALL}V{middle:g}H{tip - 9}", tip - GAP
    x = left + (tip - left) / 2 - 3
    told = [(hop.check, "axis", -25), (_sign(hop), _style(hop), -9), (hop.error_text, "strong", 19)]
    told += [(hop.allowed_text, "axis", 35)] if hop.allowed_text else []
    texts = (tag("text", text, x=x, y=middle + down, class_=style, text_anchor="middle") for text, style, down in told)
    return tag("g", *_arrow(hop, path, f"M{tip - 10} {middle - 5:g}l9 5l-9 5z"), *texts)


def _standing(boxes: dict[str, Box], hops: Sequence[Hop], caption: str) -> Markup:
    """Boxes below each other; an arrow that does not come from the box above runs around on the left."""
    tops: dict[str, int] = {}
    for hop in hops:
        for name in (hop.start, hop.end):
            tops.setdefault(name, 2 + len(tops) * (LOW + STEP))
    order = list(tops)
    arrows: list[Markup] = []
    side = LEFT - 10
    for hop in hops:
        above = order.index(hop.end) == order.index(hop.start) + 1
        y, tip = tops[hop.start] + LOW, tops[hop.end]
        if above:
            path, head = f"M{LEFT + 20} {y}V{tip - 9}", f"M{LEFT + 15} {tip - 10}l5 9l5 -9z"
        else:
            into, out = tip + LOW // 2, y - LOW // 2
            path, head = f"M{LEFT} {out}H{side}V{into}H{LEFT - 9}", f"M{LEFT - 10} {into - 5}l9 5l-9 5z"
            side = max(2, side - 6)
        arrows.append(tag("g", *_arrow(hop, path, head), *_standing_texts(hop, tip - STEP)))
    drawn = [_box(boxes[name], LEFT, top, WIDE, LOW, centred=False) for name, top in tops.items()]
    return _svg(caption, LEFT + WIDE + 4, len(order) * (LOW + STEP) - STEP + 4, "standing", [*arrows, *drawn])


def _standing_texts(hop: Hop, top: int) -> Iterable[Markup]:
    x = LEFT + 38
    yield tag(
        "text",
        tag("tspan", _sign(hop), class_=_style(hop)),
        tag("tspan", f"{SAME_LINE} {hop.check}", class_="axis"),
        x=x,
        y=top + 26,
    )
    told = hop.error_text if hop.error is None else f"error {hop.error_text}, {hop.allowed_text}"
    yield tag("text", told, x=x, y=top + 44)


def _svg(caption: str, width: int, height: int, style: str, parts: Iterable[Content]) -> Markup:
    box = f"0 0 {width} {height}"
    return tag("svg", *parts, viewBox=box, width=width, role="img", aria_label=caption, class_=f"picture {style}")


def _box(box: Box, x: int, y: int, width: int, height: int, centred: bool) -> Markup:
    title, first, second = box.lines
    frame = tag("rect", x=x, y=y, width=width, height=height, rx=5, class_="stage")
    if centred:
        rows = [(title, "strong", 23), (first, "axis", 43), (second, "axis", 59)]
        texts = [
            tag("text", text, x=x + width / 2, y=y + down, class_=style, text_anchor="middle")
            for text, style, down in rows
        ]
    else:
        told = " ".join(part for part in (first, second) if part)
        texts = [
            tag("text", title, x=x + 14, y=y + 20, class_="strong"),
            tag("text", told, x=x + 14, y=y + 38, class_="axis"),
        ]
    return tag("g", tag("title", box.name), frame, *texts)


def _arrow(hop: Hop, path: str, head: str) -> tuple[Markup, Markup]:
    return tag("path", d=path, class_=f"arrow {_style(hop)}"), tag("path", d=head, class_=f"head {_style(hop)}")


def _style(hop: Hop) -> str:
    return STATUS.get(hop.status, ("", "", "open"))[2]


def _sign(hop: Hop) -> str:
    sign, word, _ = STATUS.get(hop.status, ("○", hop.status, "open"))
    return f"{sign} {word}"


def _x(box: Box) -> int:
    return 2 + box.column * (BOX + GAP)


def _y(box: Box) -> int:
    return 2 + box.row * PITCH
