#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1             # torchrun starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64              # 8 loader threads a GPU
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120               # two minutes before the end: save and leave
#SBATCH --requeue                       # after a preemption or the failure of a node
#SBATCH --open-mode=append
# SimCLR on two nodes, in as many turns as it takes:  sbatch docs/slurm.sh
#
# Run it in the folder of the scripts. Data and OUT lie on storage that both nodes see. When the
# time is up, SLURM sends SIGTERM to all processes; they save last.pt at the same step and leave.
# SLURM requeues a job after a preemption but not after a time limit, so that the script asks
# for it: then the same command goes on from last.pt. It does so only if this turn has saved
# something, because a wrong flag would fail for ever. Once the run is complete nothing is left to
# do and the job ends.
#
# Tried on one machine, with stand-ins for srun and scontrol; not yet under SLURM itself.
OUT=${OUT:-runs/pretrain}
source .venv/bin/activate
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100       # seconds to save in; torchrun grants 30 by itself
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
mkdir -p "$(dirname "$OUT")"
started=$(mktemp -p "$(dirname "$OUT")")

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:29500" \
    pretrain.py --data data/nih --out "$OUT" "$@"
status=$?

saved=no
[ "$OUT/last.pt" -nt "$started" ] && saved=yes
rm -f "$started"
[ $status -ne 0 ] && [ $saved = yes ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
