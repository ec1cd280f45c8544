# shellcheck shell=bash disable=SC2034
# Sourced on every node. Reads the site's settings and finds python and ray. Sets:
#   job_folder    folder on each node for Ray's files and temporary files; removed when the job ends
#   inside        prefix that runs a command in the environment
#   step_options, step_prefix    the same for whole steps, where Slurm starts the container (pyxis)

# shellcheck source=/dev/null
if [ -f slurm/site.sh ]; then . slurm/site.sh; fi
if [ -n "${NODE_SCRATCH:-}" ]; then export NODE_SCRATCH; fi # train keeps its crops there

job_folder=${NODE_SCRATCH:-/tmp}/ray-$SLURM_JOB_ID
export TMPDIR=$job_folder/tmp PYTHONPATH=$PWD USER=${USER:-$(id -un)}
inside=() step_options=() step_prefix=()

# Ray holds some files for each worker, and its head for each node; many sites begin with 1,024.
most_files=$(ulimit -Hn)
[[ $most_files != unlimited && $most_files -lt 65536 ]] || most_files=65536
[[ $(ulimit -n) == unlimited || $(ulimit -n) -ge $most_files ]] || ulimit -Sn "$most_files"

usage_error() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

enter_container() { # set the arrays above; mount folders at their own paths
    local folder mounts=("$PWD" ${CONTAINER_MOUNTS[@]+"${CONTAINER_MOUNTS[@]}"})
    # Use the image's python but the host's TMPDIR, which ch-run would mount on the image's /tmp.
    local prefix=(env "TMPDIR=$TMPDIR" "PATH=${CONTAINER_PATH:-/opt/venv/bin:/usr/local/bin:/usr/bin:/bin}")
    [[ ${DATA_URL:-} != /* ]] || mounts+=("$DATA_URL")
    [[ $job_folder == /tmp/* ]] || mounts+=("$NODE_SCRATCH")
    if [[ $CONTAINER == *.sif ]]; then
        inside=(apptainer exec --pwd "$PWD" ${SLURM_GPUS_ON_NODE:+--nv})
        for folder in "${mounts[@]}"; do inside+=(--bind "$folder"); done
        inside+=("$CONTAINER" "${prefix[@]}")
    elif [ -d "$CONTAINER" ]; then
        inside=(env -u TMPDIR ch-run "--cd=$PWD")
        for folder in "${mounts[@]}"; do
            mkdir -p "$CONTAINER$folder" || usage_error "$CONTAINER has no folder $folder to mount that on: make it"
            inside+=("--bind=$folder")
        done
        inside+=("$CONTAINER" -- "${prefix[@]}")
    elif srun --help | grep -q -e --container-image; then
        local pairs=/tmp:/tmp
        for folder in "${mounts[@]}"; do pairs+=,$folder:$folder; done
        step_options=("--container-image=$CONTAINER" "--container-workdir=$PWD" "--container-mounts=$pairs")
        step_prefix=("${prefix[@]}" IN_CONTAINER=1)
    else
        usage_error "CONTAINER is '$CONTAINER': an Apptainer image (*.sif), a folder with a root file system for" \
            "Charliecloud, or an image of enroot where Slurm has the pyxis plugin; unset it to use .venv"
    fi
}

if [ -n "${IN_CONTAINER:-}" ]; then
    : # Slurm started this in the container
elif [ -n "${CONTAINER:-}" ]; then
    enter_container
elif [ -x .venv/bin/python ]; then
    PATH=$PWD/.venv/bin:$PATH
fi
