"""Command line of the benchmarks."""

import argparse
import textwrap
from functools import partial

try:
    from .lib.run import run
    from .registry import BENCHMARKS, ROOMS
    from .upkeep import gate, report, static, suite, tune
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; the benchmarks need: pip install -c constraints.txt -e '.[bench]'") from error

UPKEEP = {"all": suite, "report": report, "gate": gate, "static": static, "tune": tune}
_WIDTH, _INDENT = 80, 18


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="%(prog)s BENCHMARK [options]",
        description="Benchmarks of ntk-kernels. Each prints tables and the folder of its figures.",
        epilog=_listed(ROOMS | {"Upkeep": UPKEEP}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="BENCHMARK", help="one of those below", prog=parser.prog
    )
    for name, module in (BENCHMARKS | UPKEEP).items():
        command = commands.add_parser(
            name, usage="%(prog)s [options]", description=module.__doc__, formatter_class=_Paragraphs
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run if name in UPKEEP else partial(run, name, module))
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


class _Paragraphs(argparse.HelpFormatter):
    """Wraps each paragraph of a description by itself and leaves indented ones as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False)
            for part in paragraphs
        )


def _listed(rooms: dict) -> str:
    """Names and first lines of docstrings, room by room."""
    lines = []
    for room, modules in rooms.items():
        lines += ["", f"{room}:"]
        for name, module in modules.items():
            text = f"  {name}".ljust(_INDENT) + module.__doc__.splitlines()[0]
            lines += textwrap.wrap(text, _WIDTH, subsequent_indent=" " * _INDENT, break_on_hyphens=False)
    return "\n".join([*lines[1:], "", "python -m bench BENCHMARK --help tells the rest."])


if __name__ == "__main__":
    main()
