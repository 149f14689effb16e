"""What commands share: the `--json` option and how a document is printed."""

from __future__ import annotations

import json

import click

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,  # what ends a command early (`--saliency help`) knows it
    help="One JSON document on stdout.",
)


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, allow_nan=False))
