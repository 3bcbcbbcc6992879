#!/bin/bash
# Several machines under Slurm, one process for each GPU:
#   sbatch examples/launch/slurm.sh --recipe … --data … --output-dir /shared/runs/swin_base
# Submitted again, or by Slurm itself after a machine failed (--requeue), it goes on where it stopped.
#SBATCH --job-name=green-swin
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the limit every process gets SIGUSR1: the run finishes its update, saves and ends with code 0.
#SBATCH --signal=USR1@120
set -euo pipefail

# All of scontrol's lines are read: under `pipefail` a `head` that closes the pipe early would end the job.
hostnames=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# There is no `accelerate launch` in between: it would not pass the signal on. accelerate reads these variables.
export MASTER_ADDR=${hostnames%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1
# Divided weights (FSDP), as in fsdp.yaml:
# export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
# export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=FULL_STATE_DICT

# `exec`, so that the signal reaches Python and not a shell that waits for it.
# srun does not take --cpus-per-task over from sbatch by itself.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python examples/pretrain.py --resume auto "$@"
' green-swin "$@"
