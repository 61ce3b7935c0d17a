"""Reads the numbers of Prometheus metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, float]

LABELS = ("status", "reason")


def read_samples(text: str) -> Samples:
    """Each sample by its name without `parley_`, followed by the values of its labels.

    Buckets and creation times are left out.
    """
    return {
        " ".join([sample.name.removeprefix("parley_"), *values(sample.labels)]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def values(labels: dict[str, str]) -> list[str]:
    """The values of the labels of a sample, in order."""
    return [labels[name] for name in LABELS if name in labels]


def changes(before: Samples, after: Samples) -> Samples:
    """By how much samples differ, where they do; without sums of seconds."""
    names = [name for name in after if not name.endswith("_sum")]
    return {name: after[name] - before.get(name, 0) for name in names if after[name] != before.get(name, 0)}
