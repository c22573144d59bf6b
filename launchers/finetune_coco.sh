#!/usr/bin/env bash
#SBATCH --job-name=finetune_coco
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
''':' # bash and sbatch run down to "exec"; to Python (deepspeed, torchrun) this block is the module docstring
set -euo pipefail
roots=(${FDSCALE_ROOT:+"$FDSCALE_ROOT"} "$(dirname "${BASH_SOURCE[0]}")/.." ${SLURM_SUBMIT_DIR:+"$SLURM_SUBMIT_DIR"})
for root in "${roots[@]}"; do
  if [ -z "${FDSCALE_SITE:-}" ] && [ -f "$root/launchers/site.env" ]; then FDSCALE_SITE=$root/launchers/site.env; fi
  if [ -z "${venv:-}" ] && [ -x "$root/.venv/bin/python" ]; then venv=$root/.venv/bin/python; fi
done
# shellcheck source=/dev/null
if [ -n "${FDSCALE_SITE:-}" ]; then set +eu; . "$FDSCALE_SITE"; set -eu; fi
recipe=coco_vit_b # a first argument that is one names another; what holds "=" is a setting
if [[ ${1:-} =~ ^(coco|objects365)_ && $1 != *=* ]]; then recipe=$1; shift; fi
exec "${FDSCALE_PYTHON:-${venv:-python3}}" -m fdscale launch detect "$recipe" "$@"
: <<'#END'
'''
import sys

from fdscale.cli import main

if __name__ == "__main__":  # the guard: spawned data workers import this file again
    given = sys.argv[1:]
    own = [word for word in given if not word.startswith("--local_rank")]  # put there by DeepSpeed's launcher
    recipe = own[0] if own and own[0].startswith(("coco_", "objects365_")) and "=" not in own[0] else "coco_vit_b"
    sys.exit(main(["detect", recipe, *(word for word in given if word != recipe)]))
#END
