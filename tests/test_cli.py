from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgeprune import __version__, errors
from edgeprune.cli import COMMANDS, cli, load_command, main
from edgeprune.cli.failures import failure_of

GOLDEN = Path(__file__).parent / "golden" / "cli_help.txt"
NAMES = cli.list_commands(click.Context(cli))


def run(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgeprune", *argv], capture_output=True, text=True, input=stdin)


def surface(command: click.Command, name: str) -> Iterator[str]:
    """The commands, arguments and flags, a line each: what users' scripts depend on."""
    yield name
    context = click.Context(command)
    for parameter in command.params:
        flags = "/".join(parameter.opts + parameter.secondary_opts)
        words = [flags if isinstance(parameter, click.Option) else parameter.make_metavar(context)]
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            words.append(parameter.make_metavar(context))
        words += [word for word in ("required", "multiple") if getattr(parameter, word) and word not in words]
        yield f"  {' '.join(words)}"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            member = load_command(child) if command is cli else command.get_command(context, child)
            assert member is not None
            yield from surface(member, f"{name} {child}")


@pytest.mark.golden
def test_flags_are_those_of_the_golden_file() -> None:
    """After a wanted change: EDGEPRUNE_UPDATE_GOLDEN=1 pytest tests/test_cli.py"""
    text = "\n".join(surface(cli, "edgeprune")) + "\n"
    if os.environ.get("EDGEPRUNE_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.unit
def test_every_module_is_a_command() -> None:
    modules = {path.stem for path in Path(sys.modules["edgeprune.cli"].__path__[0]).glob("*.py")}
    shared = {"__init__", "choosing", "criteria", "failures", "output", "progress", "rebuilding", "task", "timing"}
    assert modules - shared <= {module for module, _ in COMMANDS.values()}


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_every_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"edgeprune {name}" in capsys.readouterr().out.split("xample", 1)[1]


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_the_short_help_is_a_short_help(name: str) -> None:
    command = load_command(name)
    assert command.name == name
    assert [option.name for option in command.params].count("verbose") == 1
    assert load_command(name) is command


@pytest.mark.unit
def test_help_is_quick_and_light() -> None:
    """Under half a second of CPU time, and nothing heavy loaded."""
    code = "import sys; from edgeprune.cli import main; main(['--help']); print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "torchvision", "openvino", "onnxruntime", "onnx", "numpy", "scipy", "pydantic"}
    assert "edgeprune.backends" not in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.integration
def test_what_needs_no_model_loads_no_torch(tmp_path: Path) -> None:
    """Which takes seconds of CPU time: the device at hand, the doctor, a profile of the standard kernels."""
    lines = (["devices"], ["doctor"], ["profile", "--device", "null"])
    code = f"import sys; from edgeprune.cli import main; print(*map(main, {lines}), 'torch' in sys.modules)"
    environment = dict(os.environ, EDGEPRUNE_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 0 0 False"


@pytest.mark.unit
def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.unit
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["devcies"], "no command 'devcies'; did you mean 'devices'? (try: edgeprune --help)"),
        (["--colour"], "No such option '--colour'. (try: edgeprune --help)"),
        (["devices", "--jsn"], "No such option '--jsn'. Did you mean '--json'? (try: edgeprune devices --help)"),
    ],
)
def test_usage_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"kind": "usage", "message": message, "exit_code": 2}}
    assert err == ""


@pytest.mark.unit
@pytest.mark.parametrize(
    ("raised", "kind", "exit_code", "message"),
    [
        (errors.BudgetError("least 3.1 ms"), "budget", 3, "least 3.1 ms"),
        (errors.RuntimeMissing("pip install x"), "runtime-missing", 5, "pip install x"),
        (KeyboardInterrupt(), "interrupted", 130, "interrupted; what was measured is saved"),
        (click.Abort(), "interrupted", 130, "interrupted; what was measured is saved"),
        (click.BadParameter("no number"), "usage", 2, "Invalid value: no number"),
        (PermissionError(13, "Permission denied", "out"), "storage", 1, "out: Permission denied"),
        (OSError(28, "No space left on device"), "storage", 1, "output: No space left on device"),
        (KeyError("x"), "internal", 1, "internal error: KeyError: 'x' (EDGEPRUNE_DEBUG=1 shows where)"),
    ],
)
def test_every_exception_has_a_message_and_an_exit_code(
    raised: BaseException, kind: str, exit_code: int, message: str
) -> None:
    failure = failure_of(raised)
    assert (failure.kind, failure.exit_code, str(failure)) == (kind, exit_code, message)


@pytest.mark.unit
def test_sigterm_is_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(["--version"])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.unit
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "devices.yaml").write_text("schema: 1\n")
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    assert main(["devices"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/devices.yaml:1: 'devices' must map names to devices\n"
    for argv in (["-v", "devices"], ["devices", "-v"]):
        assert main(argv) == 2
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.integration
def test_a_reader_that_goes_away_and_a_full_disk_end_quietly() -> None:
    command = f"{sys.executable} -m edgeprune devices"
    done = subprocess.run(["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")


@pytest.mark.integration
def test_devices() -> None:
    devices = {row["name"]: row for row in json.loads(run("devices", "--json").stdout)["devices"]}
    assert devices["null"]["modelled"] and devices["null"]["available"]
    assert not devices["host-openvino"]["modelled"]
    text = run("devices").stdout
    assert text.splitlines()[0].split()[:2] == ["null", "modelled"]


@pytest.mark.integration
def test_doctor() -> None:
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert (done.returncode, document["ok"]) == (0, True), document
    assert checks["torch"]["required"]
    assert checks["[openvino]"]["fix"] in (None, "pip install 'edgeprune[openvino]'")
    assert checks["backend null"]["found"].endswith("modelled")


@pytest.mark.integration
def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    done = run("doctor")
    assert done.returncode == 1
    assert "BROKEN   cache folder" in done.stdout
    assert "set EDGEPRUNE_CACHE_DIR" in done.stdout
