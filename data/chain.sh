#!/usr/bin/env bash
# The whole corpus chain: a folder of .txt, .jsonl(.gz), .html, .warc(.gz), .wet(.gz) or .parquet files to clean, resampled documents.
#   bash data/chain.sh crawl corpus            corpus/1-extract … corpus/6-resample, corpus/chain.md, corpus/chain.png
#   KEEP=3 bash data/chain.sh crawl corpus     up to three copies of a repeated good document stay
# Killed in the middle, it goes on where it was. Then: python -m data.shards --data corpus/6-resample --out shards --run RUN
set -euo pipefail
IN=${1:?usage: bash data/chain.sh CRAWL OUT} OUT=${2:?usage: bash data/chain.sh CRAWL OUT} NUMBER=0
for STEP in extract langid filter quality dedup resample; do
  NUMBER=$((NUMBER + 1))
  python -m data.chain --step $STEP --data "$IN" --out "$OUT/$NUMBER-$STEP" --keep "${KEEP:-1}"
  IN="$OUT/$NUMBER-$STEP"
done
python -m data.chain --step report --data "$OUT" --out "$OUT"
