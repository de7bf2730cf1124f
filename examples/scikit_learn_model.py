"""scikit-learn without pickle: python examples/scikit_learn_model.py (pip install skops 'weightctl[torch]').

Either as arrays, which weightctl loads like any other tensors, or whole, as skops keeps it: no file that is loaded here
can run a program.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy
import skops.io
from safetensors.numpy import save_file
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import weightctl

LEARNED = ("classes_", "coef_", "intercept_")
"""What makes a LogisticRegression one that was fitted."""


def save_arrays(estimator: LogisticRegression, directory: Path) -> None:
    """As model.safetensors."""
    save_file({name: numpy.ascontiguousarray(getattr(estimator, name)) for name in LEARNED},
              directory / "model.safetensors")  # fmt: skip


def load_arrays(directory: Path) -> LogisticRegression:
    """An estimator of the same parameters, with what was learned."""
    estimator = LogisticRegression()
    for name, tensor in weightctl.load(directory, "cpu").items():
        setattr(estimator, name, tensor.numpy())
    return estimator


def load_whole(path: Path) -> LogisticRegression:
    """Only types that skops trusts by itself."""
    if strange := skops.io.get_untrusted_types(file=path):
        raise SystemExit(f"{path} holds {', '.join(strange)}: look at them before you trust them")
    return skops.io.load(path)


def main() -> None:
    """Fit one, save it both ways, and see that what was loaded predicts the same."""
    flowers, kinds = load_iris(return_X_y=True)
    fitted = LogisticRegression(max_iter=1000).fit(flowers, kinds)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_arrays(fitted, directory)
        skops.io.dump(fitted, directory / "model.skops")
        for loaded in (load_arrays(directory), load_whole(directory / "model.skops")):
            assert numpy.array_equal(loaded.predict_proba(flowers), fitted.predict_proba(flowers))
    print(f"{fitted.score(flowers, kinds):.3f} of the flowers are told apart, as before")


if __name__ == "__main__":
    main()
