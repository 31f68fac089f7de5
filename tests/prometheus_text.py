"""Strict reader of Prometheus text, version 0.0.4: what it does not know is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SAMPLE = re.compile(r'([a-z_][a-z0-9_]*)(?:\{((?:[a-z_]+="(?:\\[\\"n]|[^\\"\n])*",?)+)\})? (\S+)')
_LABEL = re.compile(r'([a-z_]+)="((?:\\[\\"n]|[^\\"\n])*)"(?:,|$)')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Labels = frozenset[tuple[str, str]]


@dataclass
class Family:
    """A metric. Attributes: samples: by the name of the sample and its labels."""

    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def __getitem__(self, labels: dict[str, str]) -> float:
        """The value of the only sample with exactly these labels."""
        [value] = [value for (_, found), value in self.samples.items() if found == frozenset(labels.items())]
        return value


def read(text: bytes) -> dict[str, Family]:
    """All metrics by name. Each has HELP, TYPE and then its samples, once and without others between."""
    assert text.endswith(b"\n")
    families: dict[str, Family] = {}
    lines = text.decode().split("\n")[:-1]
    while lines:
        hash_help, name, help = lines.pop(0).removeprefix("# ").split(" ", 2)
        hash_type, again, kind = lines.pop(0).removeprefix("# ").split(" ")
        assert (hash_help, hash_type, again) == ("HELP", "TYPE", name)
        assert name not in families
        families[name] = family = Family(kind, help)
        while lines and lines[0][0] != "#":
            line = lines.pop(0)
            match = _SAMPLE.fullmatch(line)
            assert match, line
            sample, labels, value = match.groups()
            assert sample == name or (
                kind == "histogram" and sample.removeprefix(name) in ("_bucket", "_sum", "_count")
            )
            pairs = [
                (key, re.sub(r"\\.", lambda at: _ESCAPED[at[0]], raw)) for key, raw in _LABEL.findall(labels or "")
            ]
            key = (sample, frozenset(pairs))
            assert key not in family.samples, line
            family.samples[key] = float(value)
    return families


def buckets(family: Family, labels: dict[str, str]) -> dict[str, float]:
    """Counts of a histogram by `le`, in the order of the text."""
    wanted = frozenset(labels.items())
    return {
        le: value
        for (name, found), value in family.samples.items()
        if name.endswith("_bucket")
        for le in [dict(found)["le"]]
        if found - {("le", le)} == wanted
    }
