#!/usr/bin/env bash
# Whether a run has made all its steps: launch/finished.sh CONFIG.yaml [key.path=value ...], as train.py was called.
# Ends with 0 if so and else with 1. The exit code of training cannot tell: ranks that were asked to stop leave with 0 too.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then
    echo "usage: launch/finished.sh CONFIG.yaml [key.path=value ...]" >&2
    exit 2
fi
exec "${VENV:-.venv}"/bin/python - "$@" <<'END'
import json
import sys
from pathlib import Path

from moba_megatron.config import ConfigError, load_config

try:
    config = load_config(sys.argv[1], sys.argv[2:])
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
path = Path(config.run.dir) / "status.json"
status = json.loads(path.read_text()) if path.is_file() else {"state": "not started", "step": 0}
print(f"{config.run.dir}: {status['state']} at step {status['step']} of {config.training.steps}", file=sys.stderr)
sys.exit(status["state"] != "finished" or status["step"] < config.training.steps)
END
