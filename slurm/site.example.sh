# shellcheck shell=bash disable=SC2034
# Copy this to slurm/site.sh and keep the lines your cluster needs: it is sourced on every node before anything starts.

# Where python is, if neither in .venv nor in a container:
# module load python/3.11 cuda/12.4

# A container instead of .venv: an Apptainer image, a folder for Charliecloud, or an image of enroot (pyxis).
# CONTAINER=/shared/images/conv-facenet.sif
# CONTAINER_MOUNTS=(/shared/faces)     # folders that the job's flags name; the project and DATA_URL are there already
# CONTAINER_PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin

# Fast disk of each node, for Ray's files and copies of the crops. Keep it short: names of sockets have 107 characters.
# NODE_SCRATCH=/local/scratch

# The network Ray, NCCL and gloo use; without it the one of Slurm's own address of the node.
# RAY_INTERFACE=ib0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# How long a node may take until its Ray runs, in seconds; slow shared disks need more.
# RAY_START_LIMIT_S=600

# The way out of the cluster, for s3:// and the like. Nodes talk to each other directly.
# export https_proxy=http://proxy.example.org:3128 no_proxy=localhost,127.0.0.1,10.0.0.0/8
