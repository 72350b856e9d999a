#!/usr/bin/env bash
# Run a recipe as a Slurm job. Submit it in the root of the checkout, which all machines must share:
#
#   sbatch scripts/recipes/slurm.sh wmt14-en-de --method hkd-t               # one machine, 8 GPUs
#   sbatch --nodes 2 scripts/recipes/slurm.sh wmt14-en-de --method hkd-t     # two machines
#
# Prepare the data first, on a machine with a network: scripts/recipes/wmt14-en-de.sh --until data
# Two minutes before the time limit, the training saves a checkpoint, in the middle of an epoch, and the job is
# requeued. It then resumes from the checkpoint, as it does after preemption.
#SBATCH --job-name=hgkd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
# One task per machine: fairseq gets the machines from Slurm and starts a worker for each GPU.
set -euo pipefail
(($#)) || { echo "usage: sbatch scripts/recipes/slurm.sh RECIPE [its options]" >&2; exit 2; }
[[ -n ${SLURM_SUBMIT_DIR:-} && -n ${SLURM_JOB_NUM_NODES:-} && -n ${SLURM_GPUS_ON_NODE:-} ]] ||
    { echo "slurm.sh: works in a Slurm job with GPUs only: sbatch scripts/recipes/slurm.sh $*" >&2; exit 2; }
recipe=$SLURM_SUBMIT_DIR/scripts/recipes/$1.sh
[[ -f $recipe ]] || { echo "slurm.sh: there is no recipe $1: $recipe does not exist" >&2; exit 2; }

set -m # makes the recipe and its child processes one process group
bash "$recipe" --nodes "$SLURM_JOB_NUM_NODES" --gpus "$SLURM_GPUS_ON_NODE" "${@:2}" &
group=$! told=0 status=0
# Slurm signals this shell only (B:USR1). fairseq-train saves a checkpoint and exits; other commands are run again
# later.
trap 'told=1; kill -USR1 -- "-$group"' USR1
wait "$group" || status=$?
((told)) || exit "$status"
while kill -0 -- "-$group" 2>/dev/null; do sleep 1; done
exec scontrol requeue "$SLURM_JOB_ID"
