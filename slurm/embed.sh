#!/bin/bash
# Faces, or photos, and a model -> embeddings:  sbatch [options of sbatch] slurm/embed.sh [flags of jobs/embed.py]
#SBATCH --job-name=embed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
exec slurm/ray-cluster.sh jobs/embed.py "$@" # uses all GPUs of the allocation
