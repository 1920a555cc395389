"""Command line of the benchmarks."""

import argparse

try:
    from .quality import accounting, approximation, demo, finetune, fit, prompt, scaling
    from .speed import attention, ceilings, convert, decode, sweep
    from .upkeep import gate, report, static, suite, tune
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; the benchmarks need: pip install -c constraints.txt -e '.[bench]'") from error

BENCHMARKS = {
    "demo": demo, "attention": attention, "sweep": sweep, "decode": decode, "convert": convert, "fit": fit,
    "prompt": prompt, "finetune": finetune,
    "accounting": accounting, "approximation": approximation, "scaling": scaling, "ceilings": ceilings,
    "static": static, "gate": gate, "tune": tune, "all": suite, "report": report,
}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks of ntk-kernels. Each prints a table and leaves figures in the folder it names.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="benchmark")
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
