#!/usr/bin/env bash
#SBATCH --job-name=fd_swinv2g
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
''':' # bash and sbatch run down to "exec"; to Python (deepspeed, torchrun) this block is the module docstring
set -euo pipefail
python=${FDSCALE_PYTHON:-}
for root in ${FDSCALE_ROOT:+"$FDSCALE_ROOT"} "$(dirname "${BASH_SOURCE[0]}")/.." ${SLURM_SUBMIT_DIR:+"$SLURM_SUBMIT_DIR"}; do
  if [ -z "$python" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
done
exec "${python:-python3}" -m fdscale launch distill swinv2_g "$@"
: <<'#END'
'''
import sys

from fdscale.cli import main

if __name__ == "__main__":  # the guard: spawned data workers import this file again
    sys.exit(main(["distill", "swinv2_g", *sys.argv[1:]]))
#END
