"""What `--saliency help` prints."""

from __future__ import annotations

import click

from edgeprune.cli.output import print_json

COLUMNS = ("name", "data", "granularity", "normalise", "forward", "backward")


def print_criteria(*, as_json: bool) -> None:
    """Every criterion with what it needs, and every normalisation; a table, or one JSON document."""
    from edgeprune.saliency import CRITERIA, NORMALISATIONS

    fields = (*COLUMNS, "text", "source")
    rows = [{field: str(getattr(found, field)) for field in fields} for _, found in sorted(CRITERIA.items())]
    if as_json:
        ways = [{"name": way.name, "text": way.text} for way in NORMALISATIONS.values()]
        print_json({"criteria": rows, "normalisations": ways})
        return
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS]
    click.echo(_line(dict(zip(COLUMNS, COLUMNS, strict=True)), widths))
    for row in rows:
        click.echo(_line(row, widths))
        click.echo(f"{'':<{widths[0]}}  {row['text']} [{row['source']}]")
    click.echo("\nforward and backward: passes over the calibration samples")
    for way in NORMALISATIONS.values():
        click.echo(f"--normalise {way.name:<8}{way.text}")


def _line(row: dict[str, str], widths: list[int]) -> str:
    return "  ".join(f"{row[column]:<{width}}" for column, width in zip(COLUMNS, widths, strict=True)).rstrip()
