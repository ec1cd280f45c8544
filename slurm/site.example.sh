# shellcheck shell=bash disable=SC2034
# Copy this to slurm/site.sh and keep the lines that your cluster needs. Every node sources it before anything starts.

# Where python is, if it is neither in .venv nor in a container:
# module load python/3.11 cuda/12.4

# A container instead of .venv: an Apptainer image, a folder for Charliecloud, or an enroot image (pyxis).
# CONTAINER=/shared/images/conv-facenet.sif
# CONTAINER_MOUNTS=(/shared/faces)     # folders that your flags name; the project and DATA_URL are mounted already
# CONTAINER_PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin

# Fast local disk, for Ray's files and copies of the crops, which stay for the next job: not a folder of one job.
# Keep the path short: socket paths have at most 107 bytes.
# NODE_SCRATCH=/local/scratch

# Network for Ray, NCCL and gloo. Default: the network of the address that Slurm uses for the node.
# RAY_INTERFACE=ib0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Seconds until Ray must run on a node. Slow shared disks need more.
# RAY_START_LIMIT_S=600

# Proxy for s3:// and other traffic out of the cluster. Nodes talk to each other directly.
# export https_proxy=http://proxy.example.org:3128 no_proxy=localhost,127.0.0.1,10.0.0.0/8
