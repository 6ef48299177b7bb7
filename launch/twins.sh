#!/usr/bin/env bash
# The small experiments of configs/twins, on two CPU cores: hours in all, in pieces. Each call works for at most MINUTES (50),
# saves, and ends; the same call goes on. Finished sweeps are skipped; tables and figures go to docs/results/NAME/.
#   launch/twins.sh                       all of them
#   launch/twins.sh granularity           one
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

end=$((SECONDS + ${MINUTES:-50} * 60))
moba-megatron prepare data/python_twins.yaml data/prepared/python_twins
for name in ${@:-hybrid_stages granularity selection_variants scaling_8k scaling_32k}; do
    left=$(((end - SECONDS) / 60))
    if ((left <= 0)); then
        echo "time is up: the same command goes on with $name"
        exit 0
    fi
    moba-megatron scaling run "configs/twins/$name.yaml" --minutes "$left"
    moba-megatron scaling plot "configs/twins/$name.yaml" --output "docs/results/$name"
    moba-megatron scaling table "configs/twins/$name.yaml" --output "docs/results/$name"
done
