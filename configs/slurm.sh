#!/usr/bin/env bash
# Many nodes with SLURM: sbatch configs/slurm.sh --config sample.yaml --output /shared/attribution
#
# Lightning reads SLURM's variables: --ntasks-per-node must be the number of devices, --nodes the number of nodes.
# When the job is cut off, submit it again: finished shards are kept.
#SBATCH --job-name=attribution
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
srun python -m lightning_unlearn attribute "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.strategy ddp --data.init_args.num_workers 4
