#!/usr/bin/env bash
# Many nodes with torchrun: start this once on every node, with the same command and the node's own number.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash configs/torchrun.sh --config sample.yaml --output /shared/attribution
#
# All nodes must see --output under the same path. A run that was stopped goes on when it is started again.
set -euo pipefail
: "${NNODES:?how many nodes}" "${NODE_RANK:?number of this node, from 0}" "${MASTER_ADDR:?address of node 0}"
exec python -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="${DEVICES:-1}" \
  --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
  -m lightning_unlearn attribute "$@" \
  --trainer.num_nodes "$NNODES" --trainer.devices "${DEVICES:-1}" --trainer.strategy ddp
