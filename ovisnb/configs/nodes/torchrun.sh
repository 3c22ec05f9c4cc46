#!/usr/bin/env bash
# One run on several machines: the same command on each of them, in any order.
#
#   NODES=2 RENDEZVOUS=node0:29400 bash torchrun.sh sft.json --deepspeed zero3
#
# RENDEZVOUS  host:port of one of the machines, which all others reach; the port is free there
# NODES       how many machines
# PROCESSES   processes of each machine: its GPUs, unless told
# RUN         a name that tells this run from another at the same place
set -euo pipefail

: "${NODES:?set NODES to the number of machines}"
: "${RENDEZVOUS:?set RENDEZVOUS to host:port of one of the machines}"

exec torchrun \
  --nnodes "$NODES" \
  --nproc_per_node "${PROCESSES:-gpu}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$RENDEZVOUS" \
  --rdzv_id "${RUN:-ovisnb}" \
  --shutdown_timeout 600 \
  -m ovisnb train "$@"
