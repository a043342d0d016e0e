import argparse
import os
import platform
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from keras_effnet import cli
from keras_effnet.cli import common

ROOT = Path(__file__).resolve().parents[2]


def command(behaviour):
    """A command `probe` of the framework that does `behaviour(args)`."""

    probe = types.ModuleType("keras_effnet.cli.probe_it", "probe the framework\n\nIn detail.")
    probe.configure = lambda parser: parser.add_argument(
        "--count", type=common.positive_int, default=1
    )
    probe.run = behaviour
    return probe


@pytest.fixture
def probe(monkeypatch):
    def install(behaviour):
        monkeypatch.setattr(cli, "COMMANDS", (command(behaviour),))

    return install


def raising(error):
    def behaviour(_):
        raise error

    return behaviour


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a signal")
def test_an_interrupt_that_a_library_turns_into_an_error_is_one(probe, capsys):
    def behaviour(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("Converter failed") from error

    # As in a terminal; a shell that runs the tests in the background lets them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        probe(behaviour)
        assert cli.main(["probe-it"]) == 130
        assert capsys.readouterr().err == "error: interrupted; nothing half-written was left\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_is_called_like_its_module_and_gets_its_arguments(probe):
    seen = []
    probe(seen.append)
    assert cli.main(["probe-it", "--count", "3"]) == 0
    assert seen[0].count == 3
    assert seen[0].command_line == ("keras-effnet", "probe-it", "--count", "3")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (common.UsageError("--a needs --b."), 2, "error: --a needs --b.\n"),
        (ValueError("two\n  lines"), 1, "error: two lines\n"),
        (OSError(28, "Disk full"), 1, "error: Disk full\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (RuntimeError(), 1, "error: RuntimeError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing half-written was left\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(probe, capsys, error, code, line):
    probe(raising(error))
    assert cli.main(["probe-it"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(probe, monkeypatch):
    monkeypatch.setattr(common.logging.getLogger("keras_effnet"), "level", 0)
    probe(raising(ValueError("here")))
    with pytest.raises(ValueError, match="here"):
        cli.main(["probe-it", "--debug"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["prob"], "invalid choice: 'prob'"),
        (["probe-it", "--coun", "3"], "unrecognized arguments: --coun 3"),
        (["probe-it", "--count", "0"], "--count: a positive whole number is needed, not '0'"),
        (["probe-it", "--count", "many"], "--count: a positive whole number is needed, not 'many'"),
    ],
)
def test_arguments_that_cannot_be_read_exit_with_2(probe, capsys, argv, message):
    probe(lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_every_command_describes_every_argument():
    for module in cli.COMMANDS:
        first_line = module.__doc__.partition("\n")[0]
        assert first_line and not first_line.endswith("."), module.__name__
        parser = argparse.ArgumentParser()
        module.configure(parser)
        undescribed = [action.dest for action in parser._actions if not action.help]
        assert undescribed == [], module.__name__


def test_the_commands_themselves_load_neither_keras_nor_a_converter():
    """What they need is imported when they run, so that `--help` answers at once."""
    code = f"""
        import sys, types
        # The package itself may import Keras; its commands may not.
        package = types.ModuleType("keras_effnet")
        package.__path__ = [{str(ROOT / "keras_effnet")!r}, {str(ROOT)!r}]
        sys.modules["keras_effnet"] = package
        import keras_effnet.cli
        try:
            keras_effnet.cli.main(["export-tflite", "--help"])
        except SystemExit:
            pass
        heavy = ("keras", "tensorflow", "numpy", "keras_effnet.export", "ai_edge_litert", "PIL")
        print("LOADED", [name for name in heavy if name in sys.modules])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.endswith("LOADED []\n"), result.stdout[-500:] + result.stderr


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_a_script_is_its_command(script):
    text = script.read_text()
    name = script.stem.replace("_", "-")
    assert f'main(["{name}", *sys.argv[1:]])' in text
    assert name in [module.__name__.rpartition(".")[2].replace("_", "-") for module in cli.COMMANDS]


def test_a_script_runs_from_a_checkout_that_is_not_installed(tmp_path):
    """-S leaves out the installed packages; the script then fails at the first of them."""
    code = """
        import sys, types
        sys.argv = [sys.argv[1], "--help"]
        sys.path.insert(0, sys.argv[0].rpartition("/")[0])
        import _checkout
    """
    script = ROOT / "scripts" / "export_tflite.py"
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code), str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert "No module named 'keras_effnet'" not in result.stderr
    assert "No module named" in result.stderr  # Keras, which does come from an installation.


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("variable", "kept"),
    [("", True), ("MALLOC_MMAP_MAX_=1000", False), ("GLIBC_TUNABLES=glibc.malloc.check=0", False)],
)
def test_freed_memory_is_kept_unless_the_user_has_set_up_malloc(variable, kept):
    code = """
        import resource, threading
        from keras_effnet.cli import common

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(b"x") * 50_000_000
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        def measure():
            found.append(faults())
            found.append(faults())

        common.keep_freed_memory()
        found = []
        measure()
        # Another thread would have an arena of its own.
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
        print(*found)
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    environment.update([variable.split("=", 1)] if variable else [])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, *again = (int(word) for word in result.stdout.split())
    pages = 50_000_000 // os.sysconf("SC_PAGESIZE")
    assert first > 0.9 * pages
    assert [count < 0.1 * pages for count in again] == [kept] * 3, result.stdout


def test_progress_passes_items_on_and_is_silent_without_a_terminal(capsys):
    assert list(common.progress("abc", 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_progress_counts_on_a_terminal_and_clears_its_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(common.progress("ab", 2, "letters"))
    written = capsys.readouterr().err
    assert "\r  1/2 letters\r  2/2 letters" in written
    assert written.endswith("\r\033[K")


def test_a_stage_is_told_and_timed(capsys):
    seconds = {}
    with common.stage("build", "Building …", seconds):
        assert seconds == {}
    assert capsys.readouterr().err == "Building …\n"
    assert seconds["build"] >= 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_during_the_conversion_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "export_tflite.py")]
        + ["--model", "EfficientNetTiny", "--weights", "none", "--classes", "3"]
        + ["--output", str(tmp_path / "m.tflite"), "--report", str(tmp_path / "r.json")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them, and so the command, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Converting"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130, "".join(lines)[-3000:]
    assert lines[-1] == "error: interrupted; nothing half-written was left\n"
    assert list(tmp_path.iterdir()) == []
