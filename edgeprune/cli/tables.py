from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json

if TYPE_CHECKING:
    from edgeprune.table_listing import Item, Listing

MOST_LINES = 20
"""Rows, flags and pairs that are printed unless more are asked for; `--json` has all."""
FILE = click.Path(path_type=Path)


@click.group("table", cls=rich_click.RichGroup, epilog="Example: edgeprune table show host-openvino")
def command() -> None:
    """List, show, draw, compare, merge and import latency tables.

    TABLE is a file, a device of devices.yaml (your table of it and the one that comes with edgeprune) or a name that
    `table list` shows; TABLE@HASH takes the rows of that fingerprint instead of those of the latest session.
    """


def _command(name: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    return command.command(name, cls=rich_click.RichCommand, epilog=f"Example: edgeprune table {name} {example}")


@_command("list", "--json")
@json_option
def list_command(as_json: bool) -> None:
    """List the tables in your cache and those that come with edgeprune."""
    from edgeprune.table_listing import list_tables

    tables = list_tables()
    if as_json:
        print_json({"tables": [{**vars(table), "path": str(table.path)} for table in tables]})
        return
    if not tables:
        click.echo("no tables yet; measure one: edgeprune profile --device NAME")
    width = max((len(table.name) for table in tables), default=0)
    for table in tables:
        state = table.fault or f"{table.kernels} kernels {table.origin}"
        more = [f"{table.failures} failed"] if table.failures else []
        more += [f"{table.fingerprints} fingerprints"] if table.fingerprints > 1 else []
        more += [f"{table.warnings} warnings"] if table.warnings else []
        more += [table.description] if table.description else []
        click.echo(f"{table.name:<{width}}  {table.place:<7}  {', '.join([state, *more])}")


@_command("show", "host-openvino --kernels conv --all")
@click.argument("table")
@click.option("--kernels", "part", metavar="TEXT", help="Only those whose name holds this.")
@click.option("--all", "everything", is_flag=True, help=f"Every row, not the first {MOST_LINES}.")
@click.option("--sum", "names", type=FILE, metavar="FILE", help="Add up the imported entries named in it, one a line.")
@json_option
def show_command(table: str, part: str | None, everything: bool, names: Path | None, as_json: bool) -> None:
    """Show a table: what it was measured on, its kernels in microseconds, its failures and warnings."""
    from edgeprune.table_listing import read_listing

    listing = read_listing(table)
    if names is not None:
        _print_sum(listing, names, as_json)
        return
    items = [item for item in listing.items if part is None or part in item.name]
    if as_json:
        print_json({**_head(listing), "kernels": [_item(item) for item in items], "failures": dict(listing.failures)})
        return
    _print_head(listing)
    shown = items if everything else items[:MOST_LINES]
    width = max((len(item.name) for item in shown), default=0)
    for item in shown:
        click.echo(f"  {item.name:<{width}}  {_details(item)}".rstrip())
    if len(shown) < len(items):
        click.echo(f"  ... and {len(items) - len(shown)} more (--all, --json)")
    for kernel, reason in listing.failures.items():
        click.echo(f"  failed: {kernel}: {reason}")


@_command("plot", "host-openvino --out staircase.png")
@click.argument("table")
@click.option("--out", required=True, type=FILE, metavar="FILE.png")
@click.option("--kernel", metavar="NAME", help="A kernel of the shape to draw.  [default: the one with most widths]")
@click.option("--axis", type=click.Choice(["c_in", "c_out", "channels"]), help="The width that varies.")
@json_option
def plot_command(table: str, out: Path, kernel: str | None, axis: str | None, as_json: bool) -> None:
    """Draw the staircase of one shape: latency against one width, the steps found marked and named."""
    from dataclasses import asdict

    from edgeprune.errors import UsageError
    from edgeprune.folders import write_atomically
    from edgeprune.table_curve import curve_of, draw
    from edgeprune.table_listing import read_listing

    if out.suffix != ".png":
        raise UsageError(f"--out {out}: the plot is a .png")
    listing = read_listing(table)
    curve = curve_of(listing, kernel, axis)
    write_atomically(out, draw(curve, f"{Path(listing.name).stem}: {listing.description}"))
    if as_json:
        print_json({"out": str(out), "table": listing.name, **asdict(curve), "steps": curve.describe()})
    else:
        _warn(listing)
        click.echo(f"{curve.kernel}: {len(curve.widths)} widths of {curve.axis}, {curve.describe()} ({curve.origin})")
        if curve.stairs:
            click.echo(f"  {curve.stairs}")
        for step in curve.falls:
            click.echo(f"  {step.after} is {-step.change:.0%} faster than {step.before}")
        click.echo(str(out))


@_command("diff", "host-openvino other.jsonl")
@click.argument("first")
@click.argument("second")
@click.option(
    "--by",
    type=click.Choice(["latency", "node", "ratio"]),
    default="latency",
    show_default=True,
    help="us from end to end, us of the compute node, or the ratio to the reference kernel.",
)
@json_option
def diff_command(first: str, second: str, by: str, as_json: bool) -> None:
    """Compare two tables kernel by kernel, SECOND over FIRST: two machines, two versions of a runtime (TABLE@HASH)."""
    from dataclasses import asdict

    from edgeprune.table_comparing import compare
    from edgeprune.table_listing import read_listing

    one, two = read_listing(first), read_listing(second)
    found = compare(one, two, by)
    if as_json:
        print_json({"first": _head(one), "second": _head(two), **asdict(found)})
        return
    for word, listing in (("first", one), ("second", two)):
        click.echo(f"{word:<6}  {listing.name}: {listing.description}, {listing.origin}")
        _warn(listing)
    click.echo(
        f"{by}, second over first, {len(found.pairs)} kernels: median {found.median:.3f}x, spread {found.spread:.1%}, "
        f"90 % from {found.p5:.3f}x to {found.p95:.3f}x"
    )
    for name, ratio in found.references.items():
        click.echo(f"  reference {name}: {ratio:.3f}x")
    for pair in found.pairs[:MOST_LINES]:
        click.echo(f"  {pair.ratio:.3f}x  {pair.first:.4g} > {pair.second:.4g}  {pair.name}")
    if len(found.pairs) > MOST_LINES:
        click.echo(f"  ... and {len(found.pairs) - MOST_LINES} that differ less (--json)")
    for word, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            click.echo(f"only in {word}: {len(names)}, such as {names[0]}")


@_command("merge", "a.jsonl b.jsonl --out all.jsonl")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FILE, metavar="FILE")
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@json_option
def merge_command(files: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Write several table files as one; tell what was duplicated, torn or contradicting. The files stay as they are."""
    from dataclasses import asdict

    from edgeprune.table_merging import merge

    done = merge(files, out, force=force)
    if as_json:
        print_json({**asdict(done), "out": str(done.out)})
        return
    for place in done.unreadable:
        click.echo(f"left out: {place}", err=True)
    for doubt in done.contradicting:
        click.echo(f"warning: {doubt}", err=True)
    for name in done.undefined:
        click.echo(f"warning: no line defines {name}", err=True)
    rows = ", ".join(f"{count} of {fingerprint}" for fingerprint, count in done.fingerprints.items())
    click.echo(
        f"{done.written} lines from {len(done.lines)} files, {done.duplicates} duplicates and {len(done.unreadable)} "
        f"unreadable lines left out; rows: {rows or 'none'}: {done.out}"
    )


@_command("export", "csv host-openvino --out table.csv")
@click.argument("format_", metavar="csv|parquet", type=click.Choice(["csv", "parquet"]))
@click.argument("table")
@click.option("--out", type=FILE, metavar="FILE", help="CSV goes to stdout without.")
@json_option
def export_command(format_: str, table: str, out: Path | None, as_json: bool) -> None:
    """Write a table for other programs, one row a kernel, units in the names of the columns."""
    from edgeprune.errors import UsageError
    from edgeprune.folders import write_atomically
    from edgeprune.table_export import to_csv, to_parquet
    from edgeprune.table_listing import read_listing

    if out is None and (as_json or format_ == "parquet"):
        raise UsageError(f"--out is needed with {'--json' if as_json else 'parquet'}")
    listing = read_listing(table)
    if not as_json:
        _warn(listing)
    data = to_csv(listing) if format_ == "csv" else to_parquet(listing)
    if out is None:
        click.echo(data, nl=False)
        return
    write_atomically(out, data)
    if as_json:
        print_json({**_head(listing), "out": str(out), "rows": len(listing.items)})
    else:
        click.echo(f"{len(listing.items)} rows, {listing.origin}: {out}")


@_command("import", "resnet50_titanv.json --format halp --out titanv.jsonl")
@click.argument("file", type=FILE)
@click.option("--out", required=True, type=FILE, metavar="FILE.jsonl", help="A new file: imported rows stay apart.")
@click.option("--format", "format_", metavar="halp|ofa|nvit|spdy|csv", help="[default: from the file]")
@click.option("--unit", metavar="ns|us|ms|s", help="Of the latencies.  [default: the format's own]")
@click.option("--precision", default="fp32", show_default=True, help="Of the kernels; no format but CSV says it.")
@json_option
def import_command(file: Path, out: Path, format_: str | None, unit: str | None, precision: str, as_json: bool) -> None:
    """Read the latency table of other software; flags cells that are negative, missing or fall where they should rise.

    Nothing is filled in and nothing is mixed with measured rows. Pickles are never read.
    """
    from dataclasses import asdict

    from edgeprune.foreign_tables import import_table

    done = import_table(file, out, format=format_, unit=unit, precision=precision)
    if as_json:
        print_json({**asdict(done), "out": str(done.out)})
        return
    kinds: dict[str, list[Any]] = {}
    for flag in done.flags:
        kinds.setdefault(flag.kind, []).append(flag)
    for kind, flags in kinds.items():
        for flag in flags[:MOST_LINES]:
            click.echo(f"{flag}", err=True)
        if len(flags) > MOST_LINES:
            click.echo(f"{kind}: ... and {len(flags) - MOST_LINES} more (--json)", err=True)
    flagged = ", ".join(f"{len(flags)} {kind}" for kind, flags in kinds.items()) or "none"
    assumed = "".join(f", {name} taken as {value}" for name, value in done.facts["assumed"].items())
    click.echo(
        f"{done.entries} entries imported ({done.kernels} are kernels), format {done.format}, in {done.unit}{assumed}; "
        f"flagged: {flagged}: {done.out}"
    )


@_command("gc", "table.jsonl --duplicates --superseded")
@click.argument("table")
@click.option("--duplicates", is_flag=True, help="Drop lines that stand in the file again.")
@click.option("--superseded", is_flag=True, help="Drop session lines that came again, failures measured since.")
@click.option("--replaced", is_flag=True, help="Drop rows of kernels that a later session measured again.")
@click.option("--unreadable", is_flag=True, help="Drop lines that are torn, corrupt or of another schema.")
@click.option("--wait", is_flag=True, help="Where another process writes the table, wait for it to end.")
@json_option
def gc_command(table: str, wait: bool, as_json: bool, **asked: bool) -> None:
    """Drop lines of a table that no reader needs; without an option, only count them. Whole or not at all."""
    from edgeprune.errors import InputError
    from edgeprune.folders import shipped_tables
    from edgeprune.table_listing import find_tables
    from edgeprune.table_merging import KINDS, collect

    paths = [path for path in find_tables(table) if not path.resolve().is_relative_to(shipped_tables().resolve())]
    if not paths:
        raise InputError(f"'{table}' came with edgeprune and is not changed")
    drop = [kind for kind in KINDS if asked[kind]]
    results = [collect(path, drop, wait_s=math.inf if wait else 0.0) for path in paths]
    if as_json:
        print_json({"tables": [{**vars(result), "path": str(result.path)} for result in results]})
        return
    for result in results:
        for kind, count in result.found.items():
            state = "dropped" if kind in result.dropped else f"kept (--{kind} drops them)" if count else ""
            click.echo(f"{count:6} {kind:<10}  {KINDS[kind]}  {state}".rstrip())
        click.echo(f"{result.kept:6} lines stay: {result.path}")


def _print_sum(listing: Listing, names: Path, as_json: bool) -> None:
    from edgeprune.errors import InputError
    from edgeprune.foreign_tables import additive_model

    try:
        wanted = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=names) from None
    if not wanted:
        raise InputError("names no entry", file=names)
    model = additive_model(listing)
    total = model.predict(wanted)
    if as_json:
        print_json({**_head(listing), "sum": total, "unit": model.unit, "entries": len(wanted)})
    else:
        click.echo(f"{total!r} {model.unit}, the sum of {len(wanted)} entries (additive, imported)")


def _head(listing: Listing) -> dict[str, Any]:
    return {
        "table": listing.name,
        "paths": [str(path) for path in listing.paths],
        "fingerprint": listing.fingerprint,
        "facts": dict(listing.facts),
        "origin": listing.origin,
        "sessions": listing.sessions,
        "references_us": dict(listing.references_us),
        "other_fingerprints": dict(listing.others),
        "warnings": list(listing.warnings),
    }


def _print_head(listing: Listing) -> None:
    click.echo(f"{listing.name}: {len(listing.items)} {_nouns(listing)}, {listing.origin}")
    for path in listing.paths:
        click.echo(f"  file         {path}")
    if listing.fingerprint:
        click.echo(f"  fingerprint  {listing.fingerprint}  {listing.description}")
    if listing.sessions:
        clock = ", ".join(f"{name} {us:.4g} us" for name, us in listing.references_us.items())
        click.echo(f"  sessions     {listing.sessions}, references in the latest: {clock}")
    for other, count in listing.others.items():
        click.echo(f"  also         {count} rows of {other} (edgeprune table show {listing.name}@{other})")
    _warn(listing)


def _nouns(listing: Listing) -> str:
    return "entries" if listing.origin == "imported" else "kernels"


def _warn(listing: Listing) -> None:
    for warning in listing.warnings:
        click.echo(f"warning: {warning}", err=True)


def _item(item: Item) -> dict[str, Any]:
    document = {**vars(item), "kernel": item.kernel.to_json() if item.kernel else None, "flags": list(item.flags)}
    return {name: value for name, value in document.items() if value is not None}


def _details(item: Item) -> str:
    if item.ratio is None:
        return f"{item.value:.6g} {item.unit}  {'; '.join(item.flags)}"
    node = "" if item.node_us is None else f"  node {item.node_us:.4g} us"
    low, high = item.ratio_ci or (item.ratio, item.ratio)
    return f"{item.latency_us:.4g} us{node}  ratio {item.ratio:.4g} [{low:.4g}, {high:.4g}]  n={item.n}"
