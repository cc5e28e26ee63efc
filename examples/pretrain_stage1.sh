#!/usr/bin/env bash
""":"
# Stage 1, pre-training: captions, pointing and text.
#   torchrun examples/pretrain_stage1.sh [section.key=value ...]
#   bash examples/pretrain_stage1.sh [section.key=value ...]      starts torchrun itself; RECIPE, NPROC, NNODES ... from the environment
#
# This file is bash and Python at once, because torchrun hands it to Python. For bash, the line above is the command ':',
# which does nothing, and what follows is the script. For Python, everything up to the closing quotes is a string, and
# the lines after it hand the file to bash.
set -euo pipefail
. "$(dirname "$0")/launch.sh"
launch stage1 "$0" "$@"
exit
":"""
import os
import sys

os.environ.setdefault("PYTHON", sys.executable)
os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
