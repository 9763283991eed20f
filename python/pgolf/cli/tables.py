"""Tables that break no word: file names and numbers can be copied from them, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pgolf.common.text import wrapped

_ENDLESS = 100_000
"""A width at which nothing is wrapped."""


class WordTable(Table):
    """A table under a line of its own for its name; where the terminal is too narrow for its words, a list.

    The list has a paragraph a row: with ``headings`` the first cell, and each other one after its heading; without,
    the cells in one line.
    """

    def __init__(self, name: str | None, headings: bool) -> None:
        super().__init__(box=box.SIMPLE_HEAD, show_header=headings, collapse_padding=headings, pad_edge=not headings)
        self._name = name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._name is not None:  # Table's own title would be folded to its width
            yield _line(self._name, "table.title")
        if self._fit(console, options, padding=1) or self._fit(console, options, padding=0):
            yield from super().__rich_console__(console, options)
        else:
            yield from self._list(options.max_width)

    def _fit(self, console: Console, options: ConsoleOptions, padding: int) -> bool:
        """Gives every column its width, taking from the widest what is too much; False if a word would be broken."""
        self.padding = (0, padding)
        endless = options.update(width=_ENDLESS, max_width=_ENDLESS)
        least, widths = [], []
        for column in self.columns:
            cells = [Measurement.get(console, endless, cell) for cell in (column.header, *column.cells)]
            least.append(max(cell.minimum for cell in cells))
            widths.append(max(cell.maximum for cell in cells))
            column.width = 1
        around = Measurement.get(console, endless, self).minimum - len(self.columns)
        for _ in range(around + sum(widths) - options.max_width):
            wider = [index for index, width in enumerate(widths) if width > least[index]]
            if not wider:
                return False
            widths[max(wider, key=widths.__getitem__)] -= 1
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        return True

    def _list(self, width: int) -> Iterator[Text]:
        for number, row in enumerate(self.rows):
            cells = [list(column.cells)[number] for column in self.columns]
            named = [
                f"{column.header}: {cell}"
                for column, cell in zip(self.columns[1:], cells[1:], strict=True)
                if str(cell)
            ]
            first = str(cells[0]) if self.show_header else ": ".join(map(str, cells))
            for line in wrapped(first, width, following="    "):
                yield _line(line, str(getattr(cells[0], "style", "") or row.style or ""))
            for text in named if self.show_header else ():
                for line in wrapped(text, width, "  ", "    "):
                    yield _line(line)
        yield _line("")


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ignore")
