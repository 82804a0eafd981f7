"""What a run found, as Markdown: `python -m benchmarks.on_gpu.report results.json` writes it again.

The page on performance has its part about GPUs from results in `benchmarks/results/`, which `python -m
benchmarks.on_gpu.report` prints, and from nowhere else.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

LABELS = {
    "step": "`TrainingStep`", "hand": "by hand", "lanes_off": "lanes off",
    "torch_graph": "PyTorch, CUDA graph", "torch": "PyTorch, eager", "jax": "JAX, jitted",
}  # fmt: skip
STAND_IN = "**The CPU stand-in for CUDA: no part of this ran on a GPU, and there are counts instead of times.**"


def markdown(found: dict[str, Any]) -> str:
    """All of it."""
    card, parts = found["card"], found["parts"]
    lines = [f"# On {card.get('name', 'no card yet')}", ""]
    if card.get("stand_in"):
        lines += [STAND_IN, ""]
    lines += [described(found), "", *steps_table(found), *_kernels(parts.get("kernels", {}).get("lines", []))]
    lines += ["", "| part | seconds | found |", "|---|---|---|"]
    for name, part in parts.items():
        said = [*_SAID.get(name, _nothing)(part["lines"]), *part["trouble"]]
        lines.append(f"| {name} | {part.get('seconds', 'running')} | {_cell('; '.join(said))} |")
    wrong = [(name, line) for name, part in parts.items() for line in part["lines"] if line.get("wrong")]
    if wrong:
        lines += ["", "## What is wrong", ""]
        for name, line in wrong:
            about = ", ".join(str(line[key]) for key in ("contestant", "precision", "model") if key in line)
            last = str(line["wrong"]).strip().splitlines()[-1]
            lines.append(f"- {name}: {line.get('test') or about}: {last}")
    return "\n".join(lines)


RESULTS = Path(__file__).parents[1] / "results"


def section(results: list[dict[str, Any]]) -> str:
    """What the page on performance says of these runs."""
    real = [found for found in results if found["card"].get("name") and not found["card"].get("stand_in")]
    if not real:
        return "None yet: no run on a card has been committed."
    parts = []
    for found in real:
        lines = found["parts"].get("kernels", {}).get("lines", [])
        parts += [f"### {found['card']['name']}", "", described(found), "", *steps_table(found), *_kernels(lines), ""]
    return "\n".join(parts).rstrip()


def committed() -> list[dict[str, Any]]:
    """The results in `benchmarks/results/`, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]


def described(found: dict[str, Any]) -> str:
    """The card, the driver and the versions, in a paragraph."""
    card = found["card"]
    smi, versions = card.get("smi", {}), card.get("versions", {})
    facts = {
        "compute capability": card.get("compute_capability"), "driver": smi.get("driver_version"),
        "CUDA of the driver": card.get("driver_cuda"), "of CuPy": card.get("runtime"),
        "largest clock": smi.get("clocks.max.sm"), "power limit": smi.get("power.limit"), "commit": card.get("commit"),
        "taken along": " and ".join(found.get("carried", [])),
    }  # fmt: skip
    told = [f"{name} {value}" for name, value in facts.items() if value]
    return f"{found['began']}. {', '.join([*told, *(f'{name} {version}' for name, version in versions.items())])}."


def steps_table(found: dict[str, Any]) -> list[str]:
    """One row per model and precision, one column per contestant."""
    lines = found["parts"].get("steps", {}).get("lines", [])
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for line in lines:
        if "model" in line:
            key = line["precision"], f"{'-'.join(map(str, line['sizes']))}, batch {line['batch']}"
            rows.setdefault(key, {})[line["contestant"]] = _figure(line)
    if not rows:
        return []
    names = [name for name in LABELS if any(name in row for row in rows.values())]
    stand_in = found["card"].get("stand_in")
    what = "what one step asks of the device" if stand_in else "microseconds per step on the wall; on the card's own clock"
    table = [f"A training step (forward, cross-entropy, backward, Adam), {what}.", ""]
    table += [f"| precision | model | {' | '.join(LABELS[name] for name in names)} |", "|---" * (len(names) + 2) + "|"]
    table += [f"| {' | '.join(key)} | {' | '.join(row.get(name, '') for name in names)} |" for key, row in rows.items()]
    hows = {f"{line['precision']}, {line['model']}: {line['how']}" for line in lines if line.get("how")}
    absent = dict.fromkeys(f"{LABELS[line['contestant']]}: {line['not_here']}" for line in lines if "not_here" in line)
    return [*table, "", *(f"- {_cell(how)}" for how in sorted(hows)), *(f"- without {_cell(why)}" for why in absent)]


def _figure(line: dict[str, Any]) -> str:
    if "wall" in line:
        card = f"; {line['card'][1]:,.1f}" if "card" in line else ""
        return f"{line['wall'][1]:,.1f} ({line['wall'][0]:,.1f} to {line['wall'][2]:,.1f}){card}"
    if "counts" in line:
        return ", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in line["counts"].items())
    return "-"


def _kernels(lines: list[dict[str, Any]]) -> list[str]:
    found = []
    for line in lines:
        if "kernels" in line:
            sizes, who = "-".join(map(str, line["sizes"])), LABELS[line["contestant"]]
            title = f"Kernels of a step of {sizes}, batch {line['batch']}, {who}:"
            found += ["", title, "", "| kernel | per step | us per step |", "|---|---|---|"]
            found += [f"| `{row['kernel']}` | {row['per_step']:g} | {row['us_per_step']:.2f} |" for row in line["kernels"]]
    return found


def folded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a part to be kept: of its tests, how many ended how, and those that failed."""
    tests = [line for line in lines if "test" in line]
    if not tests or any("outcomes" in line for line in lines):
        return lines
    modules = {line["test"].partition("::")[0] for line in tests}
    about = {"outcomes": Counter(line["outcome"] for line in tests), "in_modules": len(modules)}
    return [about, *(line for line in lines if "test" not in line or line.get("wrong"))]


def _tests(lines: list[dict[str, Any]]) -> list[str]:
    about = next((line for line in folded(lines) if "outcomes" in line), {"outcomes": {}, "in_modules": 0})
    outcomes, modules = about["outcomes"], about["in_modules"]
    of_all = [f" of {line['modules']}, collected in {line['collecting']} s" for line in lines if "collected" in line]
    counts = ", ".join(f"{n} {what}" for what, n in outcomes.items())
    stopped = [line["stopped"] for line in lines if "stopped" in line]
    return [f"{counts or 'no test ran'}, of {modules} modules{''.join(of_all)}", *stopped]


def _verified(lines: list[dict[str, Any]]) -> list[str]:
    good = sum(bool(line.get("ok")) for line in lines)
    return [f"{good} of {sum('ok' in line for line in lines)} within their bounds"]


def _trained(lines: list[dict[str, Any]]) -> list[str]:
    return [
        f"{line['dtype']}: {line['accuracy']:.1%} of the digits, resumed "
        + ("bit for bit" if line["resumed_bit_for_bit"] else "with OTHER bits")
        for line in lines
    ]


def _sanitized(lines: list[dict[str, Any]]) -> list[str]:
    return [": ".join(str(line[key]) for key in ("tool", "found", "not_here", "wrong") if key in line) for line in lines]


def _nothing(lines: list[dict[str, Any]]) -> list[str]:
    return []


_SAID = {"suite": _tests, "suite, rest": _tests, "verify": _verified, "training": _trained, "sanitizer": _sanitized}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())) if sys.argv[1:] else section(committed()))
