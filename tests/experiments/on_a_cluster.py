"""Runs command lines, one after the other, on a Ray cluster of this machine: ``on_a_cluster.py LINES ANSWERS``.

Ray gives its own start half a minute, and its workers one, which is little where others are at work; here it waits.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ray._private import services

from tests.experiments.commands import nusam

PATIENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "1500",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_server_request_timeout_seconds": "1500",
    "RAY_health_check_timeout_ms": "1500000",
    "RAY_worker_register_timeout_seconds": "1500",
}
_once = services.get_node


def _patiently(*given: object) -> object:
    while True:
        try:
            return _once(*given)
        except RuntimeError:  # it has not registered yet
            time.sleep(0.5)


def main(lines: Path, answers: Path) -> None:
    services.get_node = _patiently
    done = [asdict(nusam(*line, check=False)) for line in json.loads(lines.read_text())]
    answers.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
