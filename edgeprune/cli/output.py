"""What commands share: the `--json` option and how a document is printed."""

from __future__ import annotations

import json

import click

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, allow_nan=False))
