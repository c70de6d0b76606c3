"""The command line, called as a user would."""

import sys

import pytest

from ember.__main__ import main


@pytest.fixture
def run(monkeypatch, capsys, cache, tmp_path):
    """Run a command in this process, with cache and results elsewhere: (exit status, output, errors)."""
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path / "results"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ember", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return call
