from __future__ import annotations

import io

from pipeline.run.progress import Progress, ProgressDisplay, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_says_rates_and_time_left() -> None:
    progress = Progress(rows=250, products=250, texts=250, images=1000, rejected=3, rejected_rows=1)
    line = describe(progress, 3, 12, 1000, seconds=10.0)
    assert line == "3/12 partitions, 25% of rows, 25 products/s, 100 images/s, 4 rejects, 30s left"
    assert describe(Progress(), 0, 12, 1000, 1.0).endswith("no estimate yet")
    assert describe(Progress(rows=1000), 12, 12, 1000, 1.0).endswith("done")
    assert "1h05m left" in describe(Progress(rows=1), 0, 1, 2, 3900.0)


def test_a_terminal_gets_a_bar_and_a_file_does_not() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        display = ProgressDisplay(2, 100, stream)
        display.update(Progress(rows=50))
        display.close()
    assert "[############............] 0/2 partitions, 50% of rows" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K"), "the line is left clean"
    assert file.getvalue() == ""


def test_stage_seconds_add_up() -> None:
    progress = Progress()
    for _ in range(3):
        with progress.timed("decode"):
            pass
    assert progress.seconds["decode"] > 0
    assert "seconds" not in progress.counts()
