#!/bin/bash
# Photos and a gallery -> who is in them:  sbatch [options of sbatch] slurm/identify.sh [flags of jobs/identify.py]
#SBATCH --job-name=identify
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
exec slurm/ray-cluster.sh jobs/identify.py "$@" # embeds on all GPUs of the allocation, searches on the CPUs
