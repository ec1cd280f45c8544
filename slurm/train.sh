#!/bin/bash
# Aligned faces -> a model:  sbatch [options of sbatch] slurm/train.sh [flags of jobs/train.py]
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
exec slurm/ray-cluster.sh jobs/train.py "$@" # uses all GPUs of the allocation
