#!/bin/bash
# sbatch training/launch/slurm.sh training.train_mllm CONFIG.yaml --deepspeed training/configs/deepspeed/zero3.json
#SBATCH --job-name=unitok
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarted processes would find addresses of those before them
srun torchrun \
    --max-restarts 3 \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first_node:29500" \
    -m "$@"
