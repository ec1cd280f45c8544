#!/bin/bash
# People or photos out of all outputs, and their copies off the nodes:  sbatch [options of sbatch] slurm/forget.sh [flags of jobs/forget.py]
# It needs no Ray. The nodes run one after the other: the first changes the outputs, each one its own copies of the crops.
#SBATCH --job-name=forget
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -u
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: not in a Slurm job: start it from the project's folder by  sbatch slurm/forget.sh" >&2
    exit 2
fi
. slurm/environment.sh
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Steps would read these as their own requests.
unset "${!SLURM_MEM_PER@}" SLURM_NTASKS SLURM_NPROCS "${!SLURM_NTASKS_PER@}" "${!SLURM_CPUS_PER@}" "${!SLURM_TRES_PER@}" \
    SLURM_TASKS_PER_NODE

asked=
trap 'asked=yes; [ -z "${step:-}" ] || kill -TERM "$step" 2> /dev/null' USR1
for node in $nodes; do
    step=
    [ -z "$asked" ] || break
    printf '%(%F %T)T launcher: forgetting on %s\n' -1 "$node" >&2
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --mem=0 --cpu-bind=none --input=none --export=ALL \
        "${step_options[@]}" "${step_prefix[@]}" "${inside[@]}" python jobs/forget.py "$@" &
    step=$!
    [ -z "$asked" ] || kill -TERM $step # the signal came while the step began
    while kill -0 $step 2> /dev/null; do wait $step; done # a signal interrupts wait
    wait $step
    status=$?
    [ $status = 0 ] || break
done
# What is done counts once, so a job that is queued again goes on.
if [ -n "$asked" ]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "it could not be queued again: submit the same command, it goes on" >&2
    status=75
fi
exit "${status:-1}"
