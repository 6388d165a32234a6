#!/usr/bin/env bash
# One process for each GPU, on one node or on several.
#
#   launch/torchrun.sh pretrain model=convnextv2_base experiment=in1k/pretrain_800ep data.path=/data/imagenet/train
#
# The first argument is the command, the others are its overrides, passed on as they are.
# On several nodes, start the same command on each of them, at about the same time, with the same values of:
#   NNODES          number of nodes (1); or MIN:MAX, and the run continues on the nodes that are left when one is lost,
#                   and takes in one that is started later
#   RDZV_ENDPOINT   HOST or HOST:PORT of one of the nodes, where they meet (port 29400); needed if NNODES > 1
#   MAX_RESTARTS    with MIN:MAX, how often a node starts its processes again after a failure (10)
#   RDZV_ID         a name for this run, if several runs meet at the same place (fcmae)
# In a SLURM step of one task a node (launch/slurm/torchrun.sbatch) all three are known.
# On each node:
#   NPROC_PER_NODE  processes (`gpu`: as many as there are GPUs, or 1 without one; a number, e.g. for CPUs)
#   OMP_NUM_THREADS threads of a process on the CPU (cores / processes)
#   PYTHON          the interpreter (python)
#   RUN_DIR         run directory (runs/fcmae_TIME). With NNODES > 1 it is needed, and is to be the same folder of a
#                   shared file system everywhere. To continue a run, give its directory. `hydra.run.dir=...` among
#                   the overrides does the same and comes first.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
command=$1
shift

python=${PYTHON:-python}
if [[ -z ${NNODES:-} && ${SLURM_STEP_NUM_TASKS:-1} -gt 1 ]]; then
    read -r NNODES RDZV_ENDPOINT RDZV_ID < <("$python" -m fcmae.ranks)
fi
nodes=${NNODES:-1}
per_node=${NPROC_PER_NODE:-gpu}
if [[ $per_node == gpu ]]; then
    per_node=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
    export OMP_NUM_THREADS=$((cores / per_node > 0 ? cores / per_node : 1))
fi

# The processes would each read their own clock; a restarted job needs the directory it had.
run_dir=
for override in "$@"; do
    if [[ $override == hydra.run.dir=* ]]; then
        run_dir=${override#hydra.run.dir=}
    fi
done
arguments=("$@")
if [[ -z $run_dir ]]; then
    if [[ -z ${RUN_DIR:-} && $nodes != 1 ]]; then
        echo "torchrun.sh: NNODES is $nodes; set RUN_DIR to a folder that all nodes share" >&2
        exit 2
    fi
    run_dir=${RUN_DIR:-runs/fcmae_$(date +%Y-%m-%d_%H-%M-%S)}
    arguments+=("hydra.run.dir=$run_dir")
fi

if [[ $nodes == 1 ]]; then
    meeting=(--standalone)
else
    if [[ -z ${RDZV_ENDPOINT:-} ]]; then
        echo "torchrun.sh: NNODES is $nodes; set RDZV_ENDPOINT to HOST:PORT of one of the nodes" >&2
        exit 2
    fi
    meeting=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-fcmae}")
    if [[ $nodes == *:* ]]; then
        meeting+=("--max-restarts=${MAX_RESTARTS:-10}")
    fi
fi

echo "torchrun.sh: $nodes node(s) x $per_node processes, $OMP_NUM_THREADS threads each, run directory $run_dir" >&2
# How long the ranks of a node may take after the first of them has ended, in seconds; torchrun's own patience is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
exec "$python" -m fcmae.torchrun --nnodes="$nodes" --nproc-per-node="$per_node" "${meeting[@]}" \
    -m fcmae.cli "$command" "${arguments[@]}"
