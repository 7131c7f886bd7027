"""The small chart of the last runs: a bar for each, whose height is its duration. Pure geometry."""

from __future__ import annotations

from collections.abc import Sequence

from batch_system.operations.night.sparks import Spark
from batch_system.pages.charts.night_chart import Box
from batch_system.pages.frame.formatting import duration

HEIGHT, LEAST = 24.0, 3.0
FLOOR = 30.0


def spark_boxes(sparks: Sequence[Spark], places: int = 60) -> list[Box]:
    """The newest run stands at the right. `places`: how many runs fit."""
    shown = sparks[-places:]
    longest = max((spark.seconds or 0.0 for spark in shown), default=0.0)
    width = 100 / places
    boxes = []
    for number, spark in enumerate(shown, places - len(shown)):
        share = (spark.seconds or 0.0) / longest if longest else 0.0
        height = round(LEAST + share * (HEIGHT - LEAST), 1)
        title = (
            f"{spark.state}, {duration(spark.seconds)}"
            if spark.seconds is not None
            else spark.state
        )
        left = round(number * width, 2)
        boxes.append(
            Box(
                left,
                round(width * 0.66, 2),
                round(FLOOR - height, 1),
                height,
                f"bar-{spark.state}",
                title,
            )
        )
    return boxes
