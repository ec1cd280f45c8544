#!/bin/bash
# Photos -> aligned faces:  sbatch [options of sbatch] slurm/preprocess.sh [flags of jobs/preprocess.py]
#SBATCH --job-name=preprocess
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
exec slurm/ray-cluster.sh jobs/preprocess.py "$@" # uses all GPUs of the allocation
