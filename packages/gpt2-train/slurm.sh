#!/bin/bash
# gpt2-train on several nodes under Slurm: one torchrun a node, which starts a process for each of its GPUs.
#
#   sbatch --nodes=4 slurm.sh --recipe 1558M --data DATA --out RUN
#
# Two minutes before the job's time is up the run saves, and the job is queued again; so it is after a node's failure
# or a preemption. Each time it goes on from the newest good checkpoint, as DATA and RUN lie where all nodes see them.
# A run that fails on its own ends the job. Give more minutes if a step and a checkpoint take longer.
#SBATCH --job-name=gpt2-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # another job on the node has another

# torchrun hands SIGUSR1 on to its processes. By default it kills them after 30 seconds; torch below 2.12 always does.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
# Else processes that are started again look for the dead ones' addresses (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_node:$port" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m gpt2_train "$@" &
srun=$!

# B: in --signal sends it to this script, which can then queue the job again; srun sends it on to every node.
out_of_time=
trap 'out_of_time=yes; kill -USR1 "$srun"' USR1
wait "$srun"
status=$?
while kill -0 "$srun" 2>/dev/null; do # the signal ended the first wait
  wait "$srun"
  status=$?
done
if [ -n "$out_of_time" ] && [ "$status" -ne 0 ]; then # 0: it was done in time
  echo "out of time: saved, and queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
