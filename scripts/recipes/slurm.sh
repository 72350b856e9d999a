#!/usr/bin/env bash
# A recipe as a Slurm job. From the root of the checkout, which the machines must share:
#
#   sbatch scripts/recipes/slurm.sh wmt14-en-de --method hkd-t               # one machine, 8 GPUs
#   sbatch --nodes 2 scripts/recipes/slurm.sh wmt14-en-de --method hkd-t     # two
#
# Prepare the data before, on a machine with a network: scripts/recipes/wmt14-en-de.sh --until data
# A job that runs out of time, or is preempted and queued again, goes on where it was.
#SBATCH --job-name=hgkd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# One task a machine: fairseq asks Slurm for the machines and starts a worker for each GPU itself.
set -euo pipefail
(($#)) || { echo "usage: sbatch scripts/recipes/slurm.sh RECIPE [its options]" >&2; exit 2; }
[[ -n ${SLURM_SUBMIT_DIR:-} && -n ${SLURM_JOB_NUM_NODES:-} && -n ${SLURM_GPUS_ON_NODE:-} ]] ||
    { echo "slurm.sh: works in a Slurm job with GPUs only: sbatch scripts/recipes/slurm.sh $*" >&2; exit 2; }
recipe=$SLURM_SUBMIT_DIR/scripts/recipes/$1.sh
exec bash "$recipe" --nodes "$SLURM_JOB_NUM_NODES" --gpus "$SLURM_GPUS_ON_NODE" "${@:2}"
