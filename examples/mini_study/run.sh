#!/usr/bin/env bash
# A study from text to report, every step a command: what `make mini-study` runs. Hours on two cores; it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/mini_study
out=build/mini_study
set -x

python tools/fetch_demo_data.py --output-dir build/data --corpus boolq_train_passages shakespeare rotten_tomatoes entity_tweets boolq_retrieval
test -f $out/tokenizer.model || python tools/train_tokenizer.py build/data/boolq_train_passages.jsonl build/data/shakespeare.jsonl \
    --output-prefix $out/tokenizer --vocab-size 8192
for name in boolq_train_passages shakespeare; do
    python tools/preprocess_data.py build/data/$name.jsonl --output-prefix $out/$name --tokenizer $out/tokenizer.model
done
python tools/run_study.py run $here/study.yaml --output-dir $out/study --jobs 2
python tools/run_grid.py $here/grid.yaml --output-dir $out/grid
python tools/report_study.py $out/grid --study $here/study.yaml --output-dir $out/report
