#!/usr/bin/env bash
# The demo of `make demo`: a list of commands, two CPU ranks, about four minutes. Everything lands in runs/demo.
#
# The paper's DeiT case in miniature: a small supervised ViT learns the UCI digits and becomes the frozen teacher; a
# SwinV2-G, shrunk by --smoke, learns its features; both are then fine-tuned on the same 200 labels.
set -euo pipefail
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES='' # two CPU ranks, also where GPUs are
demo=${1:-runs/demo}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

rm -rf "$demo"

say "1. shards: the digits that scikit-learn carries"
run fdscale shards pack digits "$demo/digits/train"
run fdscale shards pack digits "$demo/digits/test" --split test

say "2. a supervised teacher"
data=("data.shards=$demo/digits/train" "eval.shards=$demo/digits/test")
run fdscale launch finetune digits_teacher "run_dir=$demo/teacher" "${data[@]}" log.every=60

say "3. feature distillation under ZeRO-3, started by deepspeed itself"
run deepspeed --num_gpus 2 launchers/fd_swinv2g.sh --smoke "run_dir=$demo/distilled" "${data[@]}" log.every=30 \
  teacher.name=student_file "teacher.weights=$demo/teacher/student.safetensors"

say "4. the student, for timm"
run fdscale export "$demo/distilled" --output "$demo/export"

say "5. teacher and student, fine-tuned on the same 200 labels"
for network in teacher distilled; do
  run fdscale launch finetune digits_finetune "run_dir=$demo/finetuned_$network" "${data[@]}" log.every=30 \
    "student.weights=$demo/$network/student.safetensors"
done

say "6. what came of it (one seed: a demonstration, no result)"
run fdscale summary "$demo/teacher" "$demo/distilled" "$demo/finetuned_teacher" "$demo/finetuned_distilled"
