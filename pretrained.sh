#!/usr/bin/env bash
# The training of the checkpoint that ships: the chain of demo.sh with more steps, and drills. Killed, it goes on where it was.
#   bash pretrained.sh             80 to 100 minutes on two cores; trains in runs/pretrained, ends in runs/pretrained/export
#   SEED=1 RUN=runs/seed1 bash pretrained.sh      another seed
set -euo pipefail
RUN=${RUN:-runs/pretrained} SEED=${SEED:-0}
stage() {  # script, stage, steps
    python "$1" --run "$RUN" --seed "$SEED" --resume --stage "$2" --steps "${STEPS:-$3}"
}

[ -f "$RUN/tokenizer.tiktoken" ] || python tokenizer.py --run "$RUN" --seed "$SEED"
stage train.py general 1500
stage train.py anneal 400
stage train.py long 150
stage sft.py sft1 4500      # direct answers, few phrasings
stage sft.py pairs 1200     # is it the same word, is it the larger number?
stage sft.py drills 3000    # all that needs a thought, and copying
stage sft.py sft2 20000     # thoughts beside direct answers, all phrasings
python evaluate.py --run "$RUN" --tasks "${TASKS:-10}"
python checkpoint.py --run "$RUN" --export "$RUN/export"
