"""The command line: ``python -m ember COMMAND``."""

import argparse
import sys
from collections.abc import Callable

from ember.batch import commands
from ember.errors import EmberError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ember", description="Erase a concept from a language model.")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = parsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    command = add("reproduce", commands.reproduce)
    command.add_argument("--profile", default="laptop")
    command.add_argument("--dry-run", action="store_true", help="only list what would run")
    command.add_argument("--no-preflight", action="store_true", help="where the notebooks run on other machines")
    command = add("preflight", commands.preflight)
    command.add_argument("--profile", default="laptop")
    command = add("plan", commands.plan)
    command.add_argument("--profile", default="laptop")
    command = add("fetch", commands.fetch)
    command.add_argument("profile")
    command.add_argument("--record", help=argparse.SUPPRESS)
    for name, run in (("erase", commands.erase), ("preview", commands.preview)):
        command = add(name, run)
        command.add_argument("concept", nargs="?", help="a concept of the data folder")
        command.add_argument("--folder", help="a folder with your own concept instead")
        command.add_argument("--model", default="smollm2-135m")
        command.add_argument("--delta", type=float, default=1.0, help="edit strength (default 1)")
        command.add_argument("--rank", type=int, default=300)
        command.add_argument("--threshold", type=float, help="selection threshold in bits (default 0.6)")
        command.add_argument("--features", type=int, nargs="+", help="feature numbers, instead of the threshold")
        command.add_argument("--seed", type=int, default=42)
        if name == "erase":
            command.add_argument("--output", required=True, help="folder for the edit")
    command = add("import-features", commands.import_features)
    command.add_argument("file")
    command.add_argument("--model", required=True)
    command.add_argument("--concept", required=True)
    command.add_argument("--source", default="released", help="whose texts of the concept: released (default) or ours")
    command.add_argument("--folder", help="where these texts are, if not fetched")
    command.add_argument(
        "--field", action="append", default=[], metavar="ROLE=NAME", help="which field is F, G or tokens (repeatable)"
    )
    command.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME",
        help="full name of a class whose attributes may be read (repeatable); it is not imported",
    )  # fmt: skip
    command.add_argument("--output", required=True, help="folder for features.safetensors and features.json")
    command = add("check-data", commands.check_data)
    command.add_argument("folder", nargs="?", help="a folder with your own concept")
    command.add_argument(
        "--released", action="store_true", help="the authors' data instead (in the folder, or fetched)"
    )
    command.add_argument("--model", default="smollm2-135m", help="for the guesses after an empty question")
    command.add_argument("--no-model", action="store_true", help="leave out the checks that need a model")
    command.add_argument("--all", action="store_true", help="print every finding")
    command = add("fetch-data", commands.fetch_data)
    command.add_argument("--shared", action="store_true", help="and MMLU and AlpacaEval, which they choose rows from")
    command.add_argument("--mmlu", metavar="REVISION", help="branch, tag or commit of cais/mmlu (default main)")
    command.add_argument("--alpaca", metavar="REVISION", help="the same of tatsu-lab/alpaca_eval")
    command = add("fetch-model", commands.fetch_model)
    command.add_argument("model", nargs="?", default="smollm2-135m")
    command.add_argument("--force", action="store_true", help="discard what is cached")
    command = add("run-notebook", commands.run_notebook)
    command.add_argument("notebook")
    command.add_argument("parameters", nargs="?", default="{}", help="JSON object of parameters")
    command = add("refresh-notebooks", commands.refresh_notebooks)
    command.add_argument("notebooks", nargs="*")
    add("update-readme", commands.update_readme)
    return parser


def main() -> int:
    """Parse the command line and run the command; errors meant for users print without a traceback."""
    options = _parser().parse_args()
    try:
        return int(options.run(options))
    except (EmberError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
