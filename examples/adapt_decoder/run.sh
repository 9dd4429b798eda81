#!/usr/bin/env bash
# A decoder becomes an encoder, every step a command: what `make adapt` runs. Results in build/adapt_decoder.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/adapt_decoder
out=build/adapt_decoder
export OMP_NUM_THREADS=1 # the trainer shares the cores among its ranks by itself; this keeps torchrun from warning
train() {
    python -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_encoder.py --config "$1" --resume auto
}
export_once() { # CHECKPOINT FOLDER [OPTION ...]
    test -d "$2" || python tools/convert_checkpoint.py export "$@"
}
newest() {
    find "$out/$1/checkpoints" -maxdepth 1 -name 'step_*' | sort | tail -n 1
}
set -x

# Text and a tokenizer.
python tools/fetch_demo_data.py --output-dir build/data --corpus boolq_passages shakespeare rotten_tomatoes
test -f $out/tokenizer.model ||
    python tools/train_tokenizer.py build/data/boolq_passages.jsonl build/data/shakespeare.jsonl --output-prefix $out/tokenizer --vocab-size 8192

# A decoder, as a native Hugging Face model. One from a hub would do as well; the rest does not know where it comes from.
for name in boolq_passages shakespeare; do
    python tools/preprocess_data.py build/data/$name.jsonl --output-prefix $out/decoder_$name --tokenizer $out/tokenizer.model
done
train $here/decoder.yaml
export_once "$(newest decoder)" $out/decoder_hf

# Import it; tokenize with its own tokenizer; train.
test -d $out/imported || python tools/convert_checkpoint.py import $out/decoder_hf $out/imported --add-mask-token
for name in boolq_passages shakespeare; do
    python tools/preprocess_data.py build/data/$name.jsonl --output-prefix $out/$name --tokenizer $out/imported/tokenizer
done
train $here/adapt.yaml
train $here/detour.yaml

# Back to Hugging Face.
export_once "$(newest adapted)" $out/adapted_hf
export_once "$(newest detour)" $out/detour_hf

# Before and after, on a real task.
python tools/run_grid.py $here/causal_grid.yaml --output-dir $out/causal_grid
python tools/run_grid.py $here/grid.yaml --output-dir $out/grid
python tools/report_study.py $out/causal_grid $out/grid --title "A decoder becomes an encoder" --output-dir $out/report
