#!/bin/bash
# Photos -> report: submits preprocess, train and evaluate, which run one after the other, and prints their ids.
#   slurm/pipeline.sh [options of sbatch, for all three] [-- flags of jobs/train.py]
set -euo pipefail
cd "$(dirname "$0")/.."

options=()
while (($#)) && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# = 0 ] || shift
# The other two jobs need the data folder and the run's name.
name=default previous=
for flag in "$@"; do
    case $previous in --data) DATA_URL=$flag ;; --name) name=$flag ;; esac
    case $flag in --data=*) DATA_URL=${flag#*=} ;; --name=*) name=${flag#*=} ;; esac
    previous=$flag
done
export DATA_URL=${DATA_URL:-$PWD/data}

submitted=()
submit() { # JOB [FLAG]...: runs after the job submitted before
    local job=$1 id
    shift
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${submitted[0]:+"--dependency=afterok:${submitted[-1]}"} \
        ${options[@]+"${options[@]}"} "slurm/$job.sh" "$@") || {
        [ ${#submitted[@]} = 0 ] || scancel "${submitted[@]}"
        echo "error: $job was not submitted; the jobs before it are cancelled" >&2
        exit 2
    }
    submitted+=("${id%%;*}")
    echo "$job ${submitted[-1]}"
}

submit preprocess
submit train "$@"
submit evaluate --model "${DATA_URL%/}/runs/$name"
echo "their output is in logs/; cancel all of them with  scancel ${submitted[*]}" >&2
