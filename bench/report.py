"""For maintainers: writes the recorded figures of the CPU into README.md, between its markers."""

import argparse
import json
import re

from . import attention, decode, demo, record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README is not up to date")


def run(arguments: argparse.Namespace) -> None:
    path = record.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    updated = with_figures(text)
    if arguments.check and updated != text:
        raise SystemExit("README.md does not show the recorded figures; run: python -m bench report")
    path.write_text(updated, encoding="utf-8")
    print(f"README.md {'now shows' if updated != text else 'already shows'} the recorded figures")


def with_figures(text: str) -> str:
    """README with every part between <!-- name --> and <!-- end name --> taken from the records."""
    folder = record.ROOT / "bench" / "results" / "cpu"

    def figures(name):
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    parts = {
        "demo": (folder / "demo.md").read_text(encoding="utf-8"),
        "attention": attention_table(figures("attention")),
        "decode": demo.markdown(decode.time_table(figures("decode"))),
    }
    for name, part in parts.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", lambda m, part=part: m[1] + part + m[2], text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"README.md must have one part <!-- {name} --> ... <!-- end {name} -->, got {count}")
    return text


def attention_table(figures: dict) -> str:
    passes, rate = figures["milliseconds"], figures["matmul_tflop_per_s"]
    lines = ["| | " + " | ".join(passes) + " |", "|---|" + "---:|" * len(passes)]
    for name in passes["forward"]:
        lines.append(f"| {name} | " + " | ".join(attention.cell_of(t[name], rate) for t in passes.values()) + " |")
    lines.append(f"| a matrix product | {rate:,.3g} TFLOP/s |" + " |" * (len(passes) - 1))
    return "\n".join(lines) + "\n"
