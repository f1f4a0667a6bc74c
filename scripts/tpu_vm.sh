#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it, installs jaxdiff on every host, starts the same command on all of them.
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=gs://my-bucket SOURCE=https://... \
#     scripts/tpu_vm.sh configs/sd15_scratch.py [--field value ...]
#
# What all hosts read (`--data.root`, `--model`) or share (`--cache`, for cached latents) lies in a folder that all
# have, such as a Filestore share mounted at /shared: name it by fields, as in
#   ... configs/sd15_scratch.py --model /shared/stable-diffusion-v1-5 --data.root /shared/prepared --cache /shared/cache
# Checkpoints, figures and compiled programs go to the bucket.
#
# The same command again goes on from the newest checkpoint: after a preemption, that is all there is to do.
set -euo pipefail

: "${PROJECT:?your Google Cloud project}" "${ZONE:?a zone that has the slice, such as us-west4-a}"
: "${BUCKET:?where checkpoints go, such as gs://my-bucket}"
NAME=${NAME:-jaxdiff}
TYPE=${TYPE:-v5litepod-16}              # 4x4 chips of v5e; python -m jaxdiff.tools.plan CONFIG --topology v5e:4x4
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # the image that goes with TYPE
SOURCE=${SOURCE:?where git finds jaxdiff, such as https://github.com/OWNER/jaxdiff}
CONFIG=${1:?a config, such as configs/sd15_scratch.py}
shift

on_all_hosts() { # the hosts of a slice, all at once
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

# 1. The slice. SPOT=1 takes a cheaper one that may be taken away at any time.
if ! gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" >/dev/null 2>&1; then
    gcloud compute tpus tpu-vm create "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}
fi

# 2. The code, on every host.
on_all_hosts "test -d jaxdiff || git clone --quiet $SOURCE jaxdiff
    cd jaxdiff && git pull --quiet && python3 -m pip install --quiet --user uv
    PATH=~/.local/bin:\$PATH; uv venv --quiet --allow-existing --python 3.12 .venv && uv pip install --quiet '.[tpu]'"

# 3. The run. Processes find each other by themselves. The first one prints and logs; programs are compiled once and
#    kept in the bucket for all hosts and later starts. tmux outlives the connection.
RUN="$BUCKET/runs/$(basename "$CONFIG" .py)"
FIELDS=
(($# == 0)) || printf -v FIELDS ' %q' "$@"
on_all_hosts "cd jaxdiff && pkill -TERM -f '^.venv/bin/python train.py' && sleep 120 # a run that is there saves first
    tmux new-session -d -s train \"JAXDIFF_CACHE=$BUCKET/compiled .venv/bin/python train.py $CONFIG \
        --workdir $RUN$FIELDS 2>&1 | tee -a train.log\""

cat <<DONE
Started. What it says (process 0 speaks for all):
  gcloud compute tpus tpu-vm ssh $NAME --project=$PROJECT --zone=$ZONE --worker=0 --command='tail -f jaxdiff/train.log'
Figures: $RUN/metrics.jsonl. End it, saving first, with SIGTERM to any process:
  gcloud compute tpus tpu-vm ssh $NAME --project=$PROJECT --zone=$ZONE --worker=0 --command="pkill -TERM -f '^.venv/bin/python train.py'"
Give the slice back, or it goes on costing:
  gcloud compute tpus tpu-vm delete $NAME --project=$PROJECT --zone=$ZONE
DONE
