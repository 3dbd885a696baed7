"""The table on the terminal, and the report file to attach to an issue."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from pipelines.config import Config
from pipelines.doctor.finding import Finding
from pipelines.mlflow_store import masked
from tcan.atomic_write import atomic_write

REPORT = "report.md"


def line(finding: Finding) -> str:
    """One line of the table: status, check, duration, values."""
    return f"{finding.status:<10}  {finding.check:<19}{finding.seconds:>6.1f} s  {finding.found}"


def summary(findings: Sequence[Finding]) -> str:
    """Counts, and for each finding that is not OK what was expected and what to do."""
    counts = {status: sum(f.status == status for f in findings) for status in ("OK", "suspicious", "failed")}
    lines = [", ".join(f"{count} {status}" for status, count in counts.items())]
    for finding in findings:
        if finding.status != "OK":
            lines += [f"{finding.status}: {finding.check}: {finding.found}"]
            lines += [f"  expected: {finding.expected}"] if finding.expected else []
            lines += [f"  to do: {finding.advice}"] if finding.advice else []
    return "\n".join(lines)


def write_report(findings: Sequence[Finding], config: Config, sample: str, folder: Path) -> Path:
    """Write report.md and the files of the findings to an existing folder; returns the path of the report."""
    for finding in findings:
        for name, content in finding.files.items():
            (folder / name).write_bytes(content)
    pretrained = yaml.safe_dump(vars(config.pretrained), sort_keys=False)
    rows = [
        " | ".join(("", f.status, f.check, *map(_cell, (f.found, f.expected)), "")).strip() for f in findings
    ]
    text = "\n".join(
        [
            "# tcan doctor",
            "",
            f"tcan {version('tcan')}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, sample: {sample}",
            "",
            "| status | check | found | expected |",
            "|---|---|---|---|",
            *rows,
            "",
            "## To do",
            "",
            "```",
            summary(findings),
            "```",
            "",
            "## Pretrained models",
            "",
            "```yaml",
            masked(pretrained).rstrip(),
            "```",
            "",
        ]
    )
    with atomic_write(folder / REPORT) as partial:
        partial.write_text(text)
    return folder / REPORT


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
