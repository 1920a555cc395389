"""For maintainers: writes the recorded figures into README.md, between its markers, and draws their plots anew."""

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
    for figures in sorted((record.ROOT / "bench" / "results").glob("*/decode.json")):
        decode.plot(figures.with_suffix(".png"), json.loads(figures.read_text(encoding="utf-8")))
    print(f"README.md {'now shows' if updated != text else 'already shows'} the recorded figures")


def with_figures(text: str) -> str:
    """README with every part between <!-- benchmark: device/record --> and <!-- end --> taken from that record."""
    return re.sub(
        r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", lambda m: m[1] + part(m[2], m[3]) + m[4], text, flags=re.S
    )


def part(benchmark: str, name: str) -> str:
    """Markdown for a record below bench/results/."""
    path = record.ROOT / "bench" / "results" / name
    if benchmark == "demo":
        return path.with_suffix(".md").read_text(encoding="utf-8")
    figures = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if benchmark == "attention":
        return attention_table(figures)
    if benchmark == "decode":
        return demo.markdown(decode.time_table(figures))
    raise ValueError(f"README.md asks for the figures of {benchmark!r}, must be demo, attention or decode")


def attention_table(figures: dict) -> str:
    passes, rate = figures["milliseconds"], figures["matmul_tflop_per_s"]
    lines = ["| | " + " | ".join(passes) + " |", "|---|" + "---:|" * len(passes)]
    for name in dict.fromkeys(name for times in passes.values() for name in times):
        lines.append(f"| {name} | " + " | ".join(attention.cell_of(t.get(name), rate) for t in passes.values()) + " |")
    lines.append(f"| a matrix product | {rate:,.3g} TFLOP/s |" + " |" * (len(passes) - 1))
    return "\n".join(lines) + "\n"
