"""The small chart of the last runs: a bar for each, whose height is its duration. Pure geometry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from batch_system.operations.night.sparks import Spark
from batch_system.pages.charts.night_chart import Box
from batch_system.pages.charts.paths import Paths

HEIGHT, LEAST, FLOOR = 24, 3, 30
BAR = 0.66
"""The width of a bar, in places."""
DOTS = {"failed": "dot-failed"} | dict.fromkeys(
    ("queued", "waiting", "running", "retrying"), "dot-active"
)
"""The dot above the bar of a run that is in this state."""


@dataclass
class SparkChart:
    """`words`: how many runs there are in each state. `places`: the width of the box of its paths.
    `marked`: the bars that have a sign above them which is no dot.
    """

    number: int
    words: str
    places: int
    paths: Paths
    marked: list[Box] = field(default_factory=list)


def spark_chart(sparks: Sequence[Spark], places: int = 60) -> SparkChart:
    """The newest run stands at the right. `places`: how many runs fit."""
    shown = sparks[-places:]
    states = Counter(spark.state for spark in shown)
    words = ", ".join(f"{number} {state}" for state, number in states.most_common())
    chart = SparkChart(len(shown), words, places, Paths(is_upright=True, width=places))
    longest = max((spark.seconds or 0.0 for spark in shown), default=0.0)
    width = 100 / places
    for number, spark in enumerate(shown, places - len(shown)):
        share = (spark.seconds or 0.0) / longest if longest else 0.0
        height = round(LEAST + share * (HEIGHT - LEAST))
        top = FLOOR - height
        if spark.state == "succeeded":
            pen = chart.paths.pen("bar-succeeded", f"{BAR}")
            pen.move(number, FLOOR)  # as add_box does; a page of tasks has 1,500 of these
            pen.up(height)
            continue
        bar = Box(number * width, width * BAR, top, height, f"bar-{spark.state}")
        chart.paths.add_box(bar, bar.y, bar.height)
        if (dot := DOTS.get(spark.state)) is not None:
            chart.paths.add_dot(dot, bar.x + bar.width / 2, top - 3)
        else:
            chart.marked.append(bar)
    return chart
