#!/usr/bin/env bash
# Train on several machines: on each of them, within ten minutes,
#   launch/multi_node.sh NODES NODE HEAD RANKS CONFIG.yaml [key.path=value ...]
# or evaluate what was trained, with evaluate RUN [--parallel tensor=8,context=2 ...] in the place of CONFIG.yaml and the rest.
# NODES machines; this one is number NODE, where 0 is the head, whose name or IPv4 address is HEAD; RANKS processes on
# each, one a GPU. The machines need the same code and data, and a run.dir on a disk that they share.
# From the environment, if the defaults do not fit:
#   PORT       on the head, for the machines to find each other: 29400
#   INTERFACE  network interface between the machines: the one that leads to HEAD
#   ADDRESS    of this machine in that network: the first of INTERFACE
#   RESTARTS   how often all ranks may start again from the last checkpoint after one died: 0
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 5 ]; then
    echo "usage: launch/multi_node.sh NODES NODE HEAD RANKS CONFIG.yaml [key.path=value ...]" >&2
    exit 2
fi
nodes=$1 node=$2 head=$3 ranks=$4
shift 4
if ! head_address=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'); then
    echo "error: HEAD = $head has no IPv4 address here: give the address itself, or enter the name in /etc/hosts" >&2
    exit 2
fi
interface=${INTERFACE:-$(ip -o -4 addr show to "$head_address" | awk 'NR == 1 {print $2}')}
interface=${interface:-$(ip -o -4 route get "$head_address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')}
address=${ADDRESS:-$(ip -o -4 addr show dev "$interface" | awk 'NR == 1 {split($4, parts, "/"); print parts[1]}')}
# Both would guess: gloo by the machine's name, which often leads to loopback; NCCL by the order of the interfaces.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
source launch/environment.sh
program_of "$1"
# With the store of the attempt before, gloo would not find its ranks again.
[ "${RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "node $node of $nodes: $address by $interface, head $head_address:${PORT:-29400}, $ranks ranks, RESTARTS=${RESTARTS:-0}," \
    "$(say_environment)" >&2
# torchrun recognises the head by its name alone: told an address, each machine would wait for another one.
export PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
exec torchrun \
    --nnodes "$nodes" --nproc-per-node "$ranks" --local-addr "$address" --max-restarts "${RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$head_address:${PORT:-29400}" --rdzv-id "${PORT:-29400}" \
    --rdzv-conf "is_host=$((node == 0))" \
    "${program[@]}" "$@"
