#!/usr/bin/env bash
# The whole chain on the embedded marketplace, as plain commands. Killed in the middle, it goes on where it was.
#   bash demo.sh             18 to 25 minutes on two cores; results in runs/demo
#   RUN=runs/x STEPS=5 bash demo.sh      a quick walk through every stage
set -euo pipefail
RUN=${RUN:-runs/demo}
STEPS=${STEPS:+--steps $STEPS}   # empty: each stage's own recipe

[ -f "$RUN/tokenizer.tiktoken" ] || python tokenizer.py --run "$RUN"     # three BPE vocabularies, merged
python train.py --run "$RUN" --resume $STEPS                             # general, anneal, long
python sft.py --run "$RUN" --resume $STEPS                               # sft1 (direct), sft2 (thinking)
python otpo.py --run "$RUN" --resume $STEPS                              # preference pairs, tokens weighed by optimal transport
python evaluate.py --run "$RUN" ${TASKS:+--tasks $TASKS}                 # report.md, report.json, plots
python generate.py --run "$RUN" --prompt "What is 27 + 45?"              # an answer at once
python generate.py --run "$RUN" --prompt "What is 27 + 45?" --think      # the same with thoughts
newest=$(ls -t "$RUN"/otpo/step_*.pt | head -1)                          # int4 by AWQ, into a run folder of its own
[ -n "$(find "$RUN-awq" -name "step_*.pt" -newer "$newest" 2> /dev/null)" ] || { rm -rf "$RUN-awq" && python quantize.py --run "$RUN"; }
python generate.py --run "$RUN-awq" --prompt "What is 27 + 45?" --think  # the same in half the bytes (embedding and head stay)
