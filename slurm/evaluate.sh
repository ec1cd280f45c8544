#!/bin/bash
# A model, and faces or photos -> metrics and a report:  sbatch [options of sbatch] slurm/evaluate.sh [flags of jobs/evaluate.py]
#SBATCH --job-name=evaluate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
exec slurm/ray-cluster.sh jobs/evaluate.py "$@" # uses all GPUs of the allocation
