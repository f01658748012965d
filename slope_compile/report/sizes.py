"""The sizes on the way from the FP32 model to what is deployed, as a waterfall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slope_compile.report.charts import waterfall_bar
from slope_compile.report.data import RunData, SizeRow
from slope_compile.report.figures import ratio, size
from slope_compile.report.markup import Content, Markup, join
from slope_compile.report.tables import absent, cell, column, figure_cell, sentences, sub, table

NOTE = (
    "The faint part of a bar is what the step before took and this one does not; the part of another colour at its end "
    "is what this one takes more. Counted and nominal sizes are computed from the codes, all others are bytes of files."
)


def sizes(data: RunData) -> Markup:
    """Return every size, drawn between the step before and its own."""
    if not data.sizes:
        return absent("No sizes: no stage has written an artifact yet.")
    largest = max(row.bytes for row in data.sizes) or 1
    rows = [
        [
            cell(row.what, sub(row.stage), _bar(row.bytes, before, largest), style="half"),
            figure_cell(join([size(row.bytes), sub(f"{row.bytes:,} B")])),
            figure_cell(join([ratio(row.bytes, data.fp32_bytes), _change(row.bytes, before)])),
        ]
        for row, before in _with_step_before(data.sizes)
    ]
    head: list[Content] = ["What", column("Size"), column(join(["Against FP32", sub("and the step before")]))]
    return join([table("Size at each step, from the FP32 model to what is deployed", head, rows), sentences([NOTE])])


def _with_step_before(rows: Sequence[SizeRow]) -> Iterator[tuple[SizeRow, int | None]]:
    """Yield each size and that of the step that it comes from: engines come from the file, not from each other."""
    before: int | None = None
    for row in rows:
        yield row, before if row.step else None
        if row.step and not row.stage.startswith("build/"):
            before = row.bytes


def _bar(count: int, before: int | None, largest: int) -> Markup:
    return waterfall_bar(count / largest, (count if before is None else before) / largest)


def _change(count: int, before: int | None) -> Markup | None:
    if before is None or before == count:
        return None
    return sub(f"{'+' if count > before else '−'}{size(abs(count - before))}")
