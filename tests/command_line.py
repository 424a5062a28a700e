"""The command line in a test: what it came to, and what it said."""

from click.testing import CliRunner

from secateur.cli import main


def run(*args, code=0):
    """What a command line came to, with the exit code it must have."""
    found = CliRunner().invoke(main, [str(a) for a in args], terminal_width=200)
    assert found.exit_code == code, f"{found.exit_code}: {found.stderr}{found.stdout}{found.exception!r}"
    return found


def said(found):
    """Standard error as one line."""
    return " ".join(found.stderr.split())
