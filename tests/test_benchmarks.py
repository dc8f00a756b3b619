"""The benchmark for accelerators, in its tiny form on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_gpu(folder: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--threads", "1", "--out", str(folder)]
    command += ["--sections", "right", "--only", "resnet32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_checks_for_accelerators_hold_on_the_cpu(tmp_path: Path) -> None:
    run_gpu(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    section = content["sections"]["right"]
    checks = [row for row in section["rows"] if row["table"] == "right"]
    assert section["status"] == "finished", section
    assert len(checks) == 12
    assert all(row["holds"] and row["differing"] == 0 and row["tensors"] > 50 for row in checks), checks
    report = (tmp_path / "results.md").read_text()
    assert "## right (finished" in report and "| resnet32 | guided = plain | 85 | 0 |" in report
    assert "right" not in run_gpu(tmp_path)  # a section that is finished is not run again
