"""The command line: a thin skin that parses, calls one function of the API and prints.

One module per command, exposing `command`, imported only when its command runs: `edgeprune --help` loads no torch.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import rich_click

from edgeprune import __version__
from edgeprune.cli.failures import flush_stdout, report
from edgeprune.errors import did_you_mean

# name: (module here, short help), in the order in which data flows. Modules have the names of their stages: none is
# called like a public function or like a module of the standard library.
COMMANDS = {
    "devices": ("devices", "List the known devices; show, add, probe and remove one."),
    "doctor": ("doctor", "Show what is missing, here or on a device, and the line that mends it."),
    "profile": ("profiling", "Measure kernels on a device into its latency table."),
    "table": ("tables", "List, show, draw, compare, merge and import latency tables."),
    "inspect": ("inspecting", "Show what can be pruned in a model, and what can't and why."),
    "prune": ("prune", "Choose what to prune for a latency budget; writes plan.json."),
    "recover": ("recovering", "Repair or fine-tune a pruned model."),
    "export": ("exporting", "Write the engine of a pruned model for a device's runtime."),
    "verify": ("verifying", "Measure a bundle against its budget on the device at hand."),
    "bench": ("bench", "Measure bundles side by side."),
    "fit": ("fit", "The whole flow: a model, a device and a budget in, a measured bundle out."),
    "solve": ("solve", "Solve a problem.json with a proven bound."),
    "report": ("reporting", "Write a report on bundles."),
}
LOG = logging.getLogger("edgeprune")


def _set_level(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        LOG.setLevel(logging.DEBUG if option.name == "verbose" else logging.WARNING)


def _verbosity() -> list[click.Parameter]:
    return [
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_set_level, help="Say more."),
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_set_level, help="Warnings only."),
    ]


def load_command(name: str) -> click.Command:
    """Import a command; `-v` and `-q` are understood after its name, and that of its own commands, as before it."""
    command: click.Command = importlib.import_module(f"edgeprune.cli.{COMMANDS[name][0]}").command
    for member in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
        taken = {option.name for option in member.params}
        member.params += [option for option in _verbosity() if option.name not in taken]
    return command


class LazyGroup(rich_click.RichGroup):
    """Lists its commands from the table above; imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _) in COMMANDS.items() if (Path(__file__).parent / f"{module}.py").is_file()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return rich_click.RichCommand(name=cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if name in known:
            return name, load_command(name), args[1:]
        if not name.startswith("-"):
            ctx.fail(f"no command '{name}'{did_you_mean(name, known)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    params=_verbosity(),
    epilog="Example: edgeprune fit torchvision:resnet18 --shape 1x3x224x224 --device host-openvino --budget 0.7x",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="edgeprune")
def cli() -> None:
    """Say the latency, get the engine: prune a PyTorch model to a latency budget, measured on the device."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; gives the exit code. SIGTERM ends it as Ctrl-C does."""
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    LOG.setLevel(logging.INFO)
    LOG.handlers = [logging.StreamHandler()]
    try:
        result = cli.main(args, prog_name="edgeprune", standalone_mode=False)
        flush_stdout()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, as_json="--json" in args, verbose=LOG.isEnabledFor(logging.DEBUG))
    return result if isinstance(result, int) else 0
