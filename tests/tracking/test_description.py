"""The Markdown of a run's overview page fits into MLflow's limit, and says what it leaves out."""

import pytest

from fvdm.tracking.description import render


def page(count):
    figures = {f"group/figure_{k}": k / 3 for k in range(count)}
    events = [{"start": 1, "time": 1000}, {"figures": figures, "time": 2000}, {"status": "FINISHED", "time": 3000}]
    return render({"description": "**x**\n\nthe rest"}, events, "id", "http://server/?mode", [], str)


@pytest.mark.parametrize("count", [1, 5, 100, 500])
def test_a_long_table_is_cut_between_two_rows_and_counts_what_is_left_out(count):
    text = page(count)
    assert len(text) < 8000
    assert text.endswith("the rest")
    rows = [line for line in text.splitlines() if line.startswith("| group/")]
    assert all(row.count("|") == 3 for row in rows)
    assert (f"and {count - len(rows)} more figures" in text) == (len(rows) < count)
