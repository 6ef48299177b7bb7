#!/usr/bin/env bash
# Train in one pod of a PyTorchJob: launch/pod.sh CONFIG.yaml [key.path=value ...], the same in all of them; pytorchjob.yaml does.
# Or evaluate what was trained: launch/pod.sh evaluate RUN [--parallel tensor=8,context=2 ...], which ends as its ranks do.
# From the environment: WORLD_SIZE (pods), RANK, MASTER_ADDR, MASTER_PORT, which the operator sets, and RANKS (processes a pod).
# Ends with 0 only when the run has finished, for the operator takes a Master's 0 as the end of the job. One pod that gets TERM
# makes the ranks of all pods save and leave with 0; then every pod ends with 1 and is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then
    echo "usage: launch/pod.sh CONFIG.yaml [key.path=value ...], or evaluate RUN [options]" >&2
    exit 2
fi
: "${WORLD_SIZE:?is set by the operator}" "${RANK:?is set by the operator}" "${MASTER_ADDR:?is set by the operator}"
: "${MASTER_PORT:?is set by the operator}" "${RANKS:?processes a pod, one a GPU}"
env | grep -E '^(CUDA_DEVICE|GLOO|MASTER|NCCL|RANK|RESTARTS|WORLD)' | sort >&2
# A pod that is started again after the others have finished would wait for them in vain.
if [ "$1" != evaluate ] && launch/finished.sh "$@"; then exit 0; fi

# The name may take a moment to appear.
until getent ahostsv4 "$MASTER_ADDR" >/dev/null; do sleep 1; done
PORT=$MASTER_PORT launch/multi_node.sh "$WORLD_SIZE" "$RANK" "$MASTER_ADDR" "$RANKS" "$@" &
training=$!
# The first process of a container gets TERM alone. It goes to the ranks, past torchrun: that would leave at once, and the other
# pods would wait five minutes for it.
trap 'pkill -TERM -P "$training" || kill -TERM "$training" || true' TERM
# A trapped signal interrupts wait.
while true; do
    wait "$training" && code=0 || code=$?
    kill -0 "$training" 2>/dev/null || break
done
echo "$(date -Is) the ranks of this pod ended with $code" >&2
[ "$code" -eq 0 ] && [ "$1" != evaluate ] || exit "$code"
launch/finished.sh "$@"
